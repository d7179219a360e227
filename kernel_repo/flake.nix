{
  description = "fastmoe: fused Mixture-of-Experts, forward and backward";

  inputs = {
    kernel-builder.url = "github:huggingface/kernels/18c4d686a271ca6e56d0110fd36a9a5f58e86215";
  };

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
