"""Many runs at once: plain against slim, and sweeps; the layer above the command line's `fit`."""
