package main

import (
	"sallyport/internal/attest"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/registry"
)

// nodeVerifiers are join tokens, and what the configuration adds.
func nodeVerifiers(cfg *Config, r *registry.Registry) (map[string]control.NodeVerifier, error) {
	out := map[string]control.NodeVerifier{attest.JoinToken: attest.NewJoinToken(cfg.TrustDomain, r)}
	more, err := attest.NewVerifiers(cfg.TrustDomain, cfg.Attestors, r)
	if err != nil {
		return nil, daemon.Hint(err, "correct attestors in the configuration")
	}
	for kind, v := range more {
		out[kind] = v
	}
	return out, nil
}
