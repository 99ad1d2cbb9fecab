package rig

import (
	"context"
	"fmt"
	"os"
	"time"
)

// Sidecar starts a real sidecar with a join token for the node of that name,
// an application as its child, and what more its configuration says. It gives
// its binary; the data stands in the issuer's directory.
func (i *Issuer) Sidecar(ctx context.Context, program, name, config string, app ...string) (*Process, error) {
	token, err := i.Admin.CreateJoinToken(ctx, name, 10*time.Minute)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(i.path(name), 0o700); err != nil {
		return nil, err
	}
	conf := fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nissuer:\n  addresses: [%q]\n  bundle: %s\n  join_token: %s\ndrain: {timeout: 1s}\n%s",
		TrustDomain.Name(), i.path(name), i.address, i.path("data", "bundle.pem"), token.Value, config)
	file := i.path(name, "config.yaml")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		return nil, err
	}
	p, err := Spawn(i.path(name), name, append([]string{program, "run", "--config", file, "--"}, app...)...)
	if err == nil {
		p.admin = i.path(name, "run", "admin.sock")
	}
	return p, err
}
