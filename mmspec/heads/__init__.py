"""Draft heads, one file each: `head.kind: foo` in a recipe is `mmspec.heads.foo`."""
