"""Device code and its plain-PyTorch reference. Import it as ``unikd_fast.kernels``."""
