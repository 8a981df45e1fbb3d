"""Everything that is kept on disk: files that appear whole, keys, what is made under which, where it goes."""
