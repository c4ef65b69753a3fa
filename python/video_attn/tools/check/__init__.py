"""``video-attn check``: small problems on every backend and direction that is built here."""
