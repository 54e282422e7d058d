"""Other packages' calls and models on this package's ops."""
