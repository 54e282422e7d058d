// lean_attn::decode without Python: called through PyTorch's dispatcher, and inside an exported decoder
// layer.
//
//   decoder_layer OPS_LIBRARY PACKAGE
//
// OPS_LIBRARY is the package's compiled library, which has no Python in it, PACKAGE a layer that
// torch._inductor.aoti_compile_and_package wrote; export.py beside this file makes it, and this program.
// (<torch/torch.h> has all of this, and takes the compiler most of a minute.)
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <iostream>

// Every optional argument by its default.
std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& q, const at::Tensor& k_cache,
                                          const at::Tensor& v_cache, const at::Tensor& seq_lens) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lean_attn::decode", "");
  torch::jit::Stack stack{q, k_cache, v_cache, seq_lens};
  for (size_t i = stack.size(); i < op.schema().arguments().size(); ++i) {
    stack.push_back(*op.schema().arguments()[i].default_value());
  }
  op.callBoxed(stack);
  return {stack[0].toTensor(), stack[1].toTensor()};
}

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: decoder_layer OPS_LIBRARY PACKAGE\n";
    return 2;
  }
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader layer(arguments[2]);
  for (const int64_t tokens : {7, 100}) {  // the package is for any length
    const at::Tensor hidden = at::randn({2, 1, 256});
    const at::Tensor k_cache = at::randn({2, 128, 2, 32}), v_cache = at::randn({2, 128, 2, 32});
    const at::Tensor seq_lens = at::full({2}, tokens, at::kInt);
    const at::Tensor out = layer.run({hidden, k_cache, v_cache, seq_lens})[0];
    // What the layer computes: its hidden states are its queries.
    const at::Tensor q = hidden.view({2, 1, 8, 32});
    const auto with_attention = [&](const at::Tensor& attended) {
      return hidden + attended.reshape({2, 1, 256});
    };
    const at::Tensor by_op = with_attention(std::get<0>(decode(q, k_cache, v_cache, seq_lens)));
    const at::Tensor by_sdpa =
        with_attention(at::scaled_dot_product_attention(
                           q.transpose(1, 2), k_cache.slice(1, 0, tokens).transpose(1, 2),
                           v_cache.slice(1, 0, tokens).transpose(1, 2), {}, 0.0, false, {}, true)
                           .transpose(1, 2));
    const float difference =
        std::max((out - by_op).abs().max().item<float>(), (out - by_sdpa).abs().max().item<float>());
    std::cout << tokens << " tokens: exported layer, op and PyTorch's attention differ by " << difference
              << "\n";
    if (!(difference < 1e-5f)) return 1;
  }
}
