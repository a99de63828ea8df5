"""Names and layouts of other systems' weight files, as pure rules; one canonical form between them (Open-Sora v2 release keys)."""
