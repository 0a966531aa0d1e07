"""Other libraries' conventions on top of torchbp; each module needs the library it is named for."""
