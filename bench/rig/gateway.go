package rig

import (
	"context"
	"fmt"
	"os"
	"time"
)

// Gateway starts a real gateway with a join token for the node of that name,
// and what more its configuration says. Nothing is looked up: destinations
// need endpoints.
func (i *Issuer) Gateway(ctx context.Context, program, name, config string) (*Process, error) {
	head, err := i.joins(ctx, name)
	if err != nil {
		return nil, err
	}
	file := i.path(name, "config.yaml")
	if err := os.WriteFile(file, []byte(head+"resolvers: [\"127.0.0.1:1\"]\n"+config), 0o600); err != nil {
		return nil, err
	}
	return i.spawned(name, program, "run", "--config", file)
}

// joins gives a node a directory and what its configuration begins with.
func (i *Issuer) joins(ctx context.Context, name string) (string, error) {
	token, err := i.Admin.CreateJoinToken(ctx, name, 10*time.Minute)
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(i.path(name), 0o700); err != nil {
		return "", err
	}
	return fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nissuer:\n  addresses: [%q]\n  bundle: %s\n  join_token: %s\ndrain: {timeout: 1s}\n",
		TrustDomain.Name(), i.path(name), i.address, i.path("data", "bundle.pem"), token.Value), nil
}

// spawned starts a program of ours that has its data in the node's directory.
func (i *Issuer) spawned(name string, argv ...string) (*Process, error) {
	p, err := Spawn(i.path(name), name, argv...)
	if err == nil {
		p.admin = i.path(name, "run", "admin.sock")
	}
	return p, err
}
