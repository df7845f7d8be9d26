"""Files that other programs run: the codes that were trained, bit for bit."""
