package rig

import (
	"context"
	"os"
)

// Sidecar starts a real sidecar with a join token for the node of that name,
// an application as its child, and what more its configuration says. It gives
// its binary; the data stands in the issuer's directory.
func (i *Issuer) Sidecar(ctx context.Context, program, name, config string, app ...string) (*Process, error) {
	head, err := i.joins(ctx, name)
	if err != nil {
		return nil, err
	}
	file := i.path(name, "config.yaml")
	if err := os.WriteFile(file, []byte(head+config), 0o600); err != nil {
		return nil, err
	}
	return i.spawned(name, append([]string{program, "run", "--config", file, "--"}, app...)...)
}
