// What sequences share: prefixes whose K and V are read once for all of them.
//
// A node is a row of DecodeParams::shared: some neighbouring sequences and tokens that they have in common.
// To the schedule it is one more sequence, whose query rows are those of all its sequences and see all its
// tokens, and the sequences keep the tokens after their deepest node. A node's states, with its parent's
// merged into them, are merged into those of its sequences or of its children. On the schedule's line nodes
// come after all sequences, children before their parents, since ranges are handed out from the last one on:
// whoever waits for a node waits for a range that was taken earlier, or for a segment that came earlier in
// its own.
#pragma once

#include <algorithm>
#include <vector>

#include "params.h"

namespace lean::cpu {

class Sharing {
 public:
  // The rows have been checked: see find_bad_shared.
  explicit Sharing(const DecodeParams& p) : p_(p) {
    for (int64_t i = 0; i < p.shared.count; ++i) {
      const SharedNode node = p.shared.node(i);
      if (node.is_empty()) continue;
      nodes_.push_back({node, -1});
      for (int64_t j = 0; j + 1 < count(); ++j) {
        if (nodes_[j].node.contains(node)) nodes_.back().parent = j;
      }
    }
    if (count() == 0) return;
    node_of_.assign(p.batch, -1);
    for (int64_t i = 0; i < count(); ++i) {
      const SharedNode& node = nodes_[i].node;
      std::fill(node_of_.begin() + node.first_sequence, node_of_.begin() + node.end_sequence, i);
    }
  }

  // Nodes.
  int64_t count() const { return static_cast<int64_t>(nodes_.size()); }

  // Sequences of the schedule. The functions below take the number of one.
  int64_t sequences() const { return p_.sequences() + count(); }
  bool is_node(int64_t i) const { return i >= p_.sequences(); }
  // The number of a node among the nodes.
  int64_t node(int64_t i) const { return sequences() - 1 - i; }
  int64_t sequence(int64_t node) const { return sequences() - 1 - node; }

  SequenceLength length(int64_t i) const {
    if (is_node(i)) {
      const SharedNode& n = nodes_[node(i)].node;
      return {n.end_token, n.first_token, p_.first_row(n.end_sequence) - p_.first_row(n.first_sequence),
              true};
    }
    SequenceLength length = p_.scheduled_length(i);
    if (const int64_t node = prefix(i); node >= 0) length.leftpad = nodes_[node].node.end_token;
    return length;
  }
  // The node whose states are merged into those of this one; -1: none.
  int64_t prefix(int64_t i) const {
    return count() == 0 ? -1 : is_node(i) ? nodes_[node(i)].parent : node_of_[i];
  }
  // The sequence of the batch that has the tokens.
  int64_t batch(int64_t i) const { return is_node(i) ? nodes_[node(i)].node.first_sequence : i; }

 private:
  struct Place {
    SharedNode node;
    int64_t parent;
  };

  const DecodeParams& p_;
  std::vector<Place> nodes_;
  std::vector<int64_t> node_of_;  // each sequence's deepest node; -1: none
};

}  // namespace lean::cpu
