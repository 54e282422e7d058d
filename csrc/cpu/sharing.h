// What sequences share: prefixes whose K and V are read once for all of them. shared_walk.h has the order.
#pragma once

#include <vector>

#include "params.h"

namespace lean::cpu {

// The schedule's sequences: a node for each row of `shared`, then those of the batch. Functions take the
// number of one.
class Sharing {
 public:
  explicit Sharing(const DecodeParams& p) : p_(p) {
    if (nodes() == 0) return;
    for (int64_t i = 0; i < sequences(); ++i) {
      const SharedNode own = node_or_sequence(i);
      const int64_t before = is_node(i) ? i : nodes();
      parents_.push_back(p.shared.deepest(own.first_sequence, own.end_sequence, before));
      depths_.push_back(p.shared.depth(own.first_sequence, own.end_sequence, before));
    }
  }

  // Those of empty rows have no query tokens.
  int64_t nodes() const { return p_.shared.count; }
  int64_t sequences() const { return nodes() + p_.sequences(); }
  bool is_node(int64_t i) const { return i < nodes(); }

  SequenceLength length(int64_t i) const {
    if (is_node(i)) return p_.node_length(p_.shared.node(i));
    SequenceLength length = p_.scheduled_length(i - nodes());
    if (const int64_t node = parent(i); node >= 0) length.leftpad = p_.shared.node(node).end_token;
    return length;
  }
  // The node that merges its states; -1: it writes the outputs itself.
  int64_t parent(int64_t i) const { return nodes() == 0 ? -1 : parents_[i]; }
  // How many nodes its states go through.
  int64_t depth(int64_t i) const { return nodes() == 0 ? 0 : depths_[i]; }
  // The sequence of the batch that has its tokens, and its first row; of a schedule whose lengths are per
  // head, its number.
  int64_t batch(int64_t i) const { return nodes() == 0 ? i : node_or_sequence(i).first_sequence; }

 private:
  SharedNode node_or_sequence(int64_t i) const {
    return is_node(i) ? p_.shared.node(i) : SharedNode{i - nodes(), i - nodes() + 1, 0, 0};
  }

  const DecodeParams& p_;
  std::vector<int64_t> parents_, depths_;
};

}  // namespace lean::cpu
