package rig

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// Sidecars says how a pair of sidecars is started, with an issuer of its own.
// The load process is the child of one, the origin of the other.
type Sidecars struct {
	// Name of the pair.
	Name string
	// Issuer and Sidecar are the binaries.
	Issuer, Sidecar string
	// Protocol of the service, and the call that Rules allows: "http" or "tcp".
	Protocol string
	// AppProtocol is what the origin speaks, if not HTTP/1.1, and Method a call
	// of gRPC that is allowed beside the others. Optional.
	AppProtocol, Method string
	// Rules is the number of rows of the policy; the last allows the load.
	Rules int
	// More is what the configurations of both say besides.
	More string
	// Load and Origin are the programs; a socket and an address are appended.
	Load, Origin []string
}

// Sidecars starts the pair. It gives the socket that takes orders and the
// address of the origin.
func (g *Ground) Sidecars(ctx context.Context, s Sidecars) (p *Pair, socket, origin string, err error) {
	issuer, err := Start(ctx, Config{Program: s.Issuer, Files: s.files()})
	if err != nil {
		return nil, "", "", err
	}
	g.AtEnd(func() { _ = issuer.Close() })
	front, far, err := g.Ports()
	if err != nil {
		return nil, "", "", err
	}
	if origin, err = FreePort(); err != nil {
		return nil, "", "", err
	}
	p = &Pair{Name: s.Name, Target: front}
	g.AtEnd(p.Stop)
	server, err := issuer.Sidecar(ctx, s.Sidecar, "server", s.More+s.inbound(far, origin), append(s.Origin, origin)...)
	if err != nil {
		return nil, "", "", err
	}
	p.Procs = append(p.Procs, server)
	if err := server.Await(ctx, "tcp", origin, far); err != nil {
		return nil, "", "", err
	}
	socket = filepath.Join(g.Dir, s.Name+".sock")
	client, err := issuer.Sidecar(ctx, s.Sidecar, "client", s.More+fmt.Sprintf("outbound: {upstreams: [{service: origin, listen: %q}]}\n", front), append(s.Load, socket)...)
	if err != nil {
		return nil, "", "", err
	}
	p.Procs = append(p.Procs, client)
	return p, socket, origin, errors.Join(client.Await(ctx, "unix", socket), client.Await(ctx, "tcp", front))
}

func (s Sidecars) inbound(far, origin string) string {
	if s.AppProtocol == "" {
		return fmt.Sprintf("inbound: {listen: %q, app: %q}\n", far, origin)
	}
	return fmt.Sprintf("inbound: {listen: %q, app: %q, app_protocol: %s}\n", far, origin, s.AppProtocol)
}

func (s Sidecars) files() map[string]string {
	id := func(name string) string { return "spiffe://" + TrustDomain.Name() + "/ns/bench/sa/" + name }
	var access strings.Builder
	row := func(name, verb, path string) {
		fmt.Fprintf(&access, "p, %s, in, %s, %s, 8443, %s, %s, -, allow\n", name, id("client"), id("origin"), verb, path)
	}
	for n := range s.Rules - 1 {
		if s.Protocol == "tcp" {
			fmt.Fprintf(&access, "p, r%d, in, %s-%d, %s, 8443, CONNECT, -, -, allow\n", n, id("client"), n, id("origin"))
			continue
		}
		row(fmt.Sprintf("r%d", n), "GET|POST", fmt.Sprintf("/v2/thing-%d/**", n))
	}
	if s.Protocol == "tcp" {
		row("stream", "CONNECT", "-")
	} else {
		row("get", "GET", "/v1/**")
	}
	if s.Method != "" {
		row("call", "POST", s.Method)
	}
	return map[string]string{
		"entries.yaml": fmt.Sprintf("entries:\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n",
			id("client"), Agent("client"), id("origin"), Agent("server")),
		"services.yaml": fmt.Sprintf("services:\n  - {name: origin, identity: %q, port: 8443, protocol: %s}\n", id("origin"), s.Protocol),
		"access.csv":    access.String(), "guardrails.csv": "", "egress.yaml": "destinations: []\n",
	}
}
