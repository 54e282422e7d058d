"""Other packages' models on this package's ops; each module needs the package that it is named after."""
