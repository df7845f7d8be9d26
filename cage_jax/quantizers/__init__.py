"""How one array is quantized: formats, scale types, scale rules, presets, rounding."""
