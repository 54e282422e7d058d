// What sequences share: prefixes whose K and V are read once for all of them. shared_walk.h has the order.
#pragma once

#include <vector>

#include "params.h"

namespace lean::cpu {

// The schedule's sequences: those of the batch, then a node for each row of `shared`, from the last one on.
class Sharing {
 public:
  explicit Sharing(const DecodeParams& p) : p_(p) {
    if (count() == 0) return;
    for (int64_t i = 0; i < count(); ++i) {
      const SharedNode node = p.shared.node(i);
      parents_.push_back(p.shared.deepest(node.first_sequence, node.end_sequence, i));
    }
    for (int64_t b = 0; b < p.batch; ++b) node_of_.push_back(p.shared.deepest(b, b + 1, count()));
  }

  // Nodes. Those of empty rows have no query tokens.
  int64_t count() const { return p_.shared.count; }

  // Sequences of the schedule. The functions below take the number of one.
  int64_t sequences() const { return p_.sequences() + count(); }
  bool is_node(int64_t i) const { return i >= p_.sequences(); }
  // The number of a node among the nodes, and back.
  int64_t node(int64_t i) const { return sequences() - 1 - i; }
  int64_t sequence(int64_t node) const { return sequences() - 1 - node; }

  SequenceLength length(int64_t i) const {
    if (is_node(i)) return p_.node_length(p_.shared.node(node(i)));
    SequenceLength length = p_.scheduled_length(i);
    if (const int64_t node = prefix(i); node >= 0) length.leftpad = p_.shared.node(node).end_token;
    return length;
  }
  // The node whose states are merged into those of this one; -1: none.
  int64_t prefix(int64_t i) const { return count() == 0 ? -1 : is_node(i) ? parents_[node(i)] : node_of_[i]; }
  // The sequence of the batch that has the tokens.
  int64_t batch(int64_t i) const { return is_node(i) ? p_.shared.node(node(i)).first_sequence : i; }

 private:
  const DecodeParams& p_;
  std::vector<int64_t> parents_;
  std::vector<int64_t> node_of_;  // each sequence's deepest node; -1: none
};

}  // namespace lean::cpu
