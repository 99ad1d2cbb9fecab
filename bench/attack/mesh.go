package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"sallyport/bench/rig"
)

// origin is the service behind the sidecar, outside the host behind the gateway.
const origin, outside = "origin.mesh.internal", "server.bench.test"

// A mesh is an issuer, a workload that calls another one and a host outside, and
// a hostile peer: a program beside the first workload with an SVID of its own.
type mesh struct {
	*rig.Ground
	client, server, gate *rig.Process
	out, in, gateway     string
	load                 *rig.Loader[order, rig.Calls]
	enemy                *rig.Loader[hostile, toll]
	svid                 string // of the hostile peer: certificate and key
}

// rules is the number of rows of the policy.
const rules = 1000

func start(ctx context.Context, s settings) (_ *mesh, err error) {
	ground, err := rig.NewGround()
	if err != nil {
		return nil, err
	}
	m := &mesh{Ground: ground}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	far, err := m.serveOutside()
	if err != nil {
		return nil, err
	}
	issuer, err := rig.Start(ctx, rig.Config{Program: s.issuer, Files: policy(far)})
	if err != nil {
		return nil, err
	}
	m.AtEnd(func() { _ = issuer.Close() })
	ports := make([]string, 4)
	for i := range ports {
		if ports[i], err = rig.FreePort(); err != nil {
			return nil, err
		}
	}
	m.out, m.in, m.gateway = ports[0], ports[1], ports[2]
	// Room for the crowd and for the others.
	more := fmt.Sprintf("limits: {connections: %d, peer_connections: %d}\n", 2*s.crowd+1000, s.crowd+s.slow+1000)
	if s.profile != "" {
		more += "pprof: true\n"
	}
	if m.gate, err = issuer.Gateway(ctx, s.gateway, "gateway", more+fmt.Sprintf("listen: %q\n", m.gateway)); err != nil {
		return nil, err
	}
	m.AtEnd(m.gate.Stop)
	if m.server, err = issuer.Sidecar(ctx, s.sidecar, "server", more+fmt.Sprintf("inbound: {listen: %q, app: %q}\n", m.in, ports[3]), m.Self, "origin", ports[3]); err != nil {
		return nil, err
	}
	m.AtEnd(m.server.Stop)
	if err = errors.Join(m.gate.Await(ctx, "tcp", m.gateway), m.server.Await(ctx, "tcp", ports[3], m.in)); err != nil {
		return nil, err
	}
	socket := filepath.Join(m.Dir, "load.sock")
	conf := more + fmt.Sprintf("outbound: {listen: %q}\negress: {gateway: %s, addresses: [%q]}\n", m.out, identity("gateway"), m.gateway)
	if m.client, err = issuer.Sidecar(ctx, s.sidecar, "client", conf, m.Self, "load", socket); err != nil {
		return nil, err
	}
	m.AtEnd(m.client.Stop)
	if err = errors.Join(m.client.Await(ctx, "unix", socket, socket+enemySuffix), m.client.Await(ctx, "tcp", m.out)); err != nil {
		return nil, err
	}
	if m.load, err = rig.DialLoader[order, rig.Calls](socket); err != nil {
		return nil, err
	}
	if m.enemy, err = rig.DialLoader[hostile, toll](socket + enemySuffix); err != nil {
		return nil, err
	}
	cert, err := issuer.Identity(ctx, "crowd")
	if err != nil {
		return nil, err
	}
	if m.svid, err = m.keep("crowd.pem", cert); err != nil {
		return nil, err
	}
	return m, m.answers(ctx, s)
}

// keep writes an SVID to a file.
func (m *mesh) keep(name string, cert *tls.Certificate) (string, error) {
	var text []byte
	for _, der := range cert.Certificate {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return "", err
	}
	return m.File(name, string(append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)))
}

// serveOutside starts the host outside and gives its address.
func (m *mesh) serveOutside() (string, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(m.Dir, "server.pem"), filepath.Join(m.Dir, "server.pem"))
	if err != nil {
		return "", err
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})
	if err != nil {
		return "", err
	}
	m.AtEnd(func() { l.Close() })
	go func() { _ = answerOn(l) }() // until it is closed
	return l.Addr().String(), nil
}

func identity(name string) string {
	return "spiffe://" + rig.TrustDomain.Name() + "/ns/bench/sa/" + name
}

func policy(far string) map[string]string {
	var access, entries []byte
	for n := range rules {
		access = fmt.Appendf(access, "p, r%d, in, %s, %s, 8443, GET|POST, /v2/thing-%d/**, -, allow\n", n, identity("client"), identity("origin"), n)
	}
	entries = append(entries, "entries:\n"...)
	for _, e := range [][3]string{{"client", "client", "child"}, {"origin", "server", "child"}, {"gateway", "gateway", "self"}, {"crowd", "crowd", "child"}} {
		entries = fmt.Appendf(entries, "  - {spiffe_id: %q, parent_id: %q, selectors: [\"%s:true\"]}\n", identity(e[0]), rig.Agent(e[1]), e[2])
	}
	for _, who := range []string{"client", "crowd"} {
		access = fmt.Appendf(access, "p, get-%s, in, %s, %s, 8443, GET, /v1/**, -, allow\n", who, identity(who), identity("origin"))
		access = fmt.Appendf(access, "p, out-%s, out, %s, host:%s, 443, CONNECT, -, env.sni=same, allow\n", who, identity(who), outside)
	}
	return map[string]string{
		"entries.yaml":  string(entries),
		"services.yaml": fmt.Sprintf("services:\n  - {name: origin, identity: %q, port: 8443, protocol: http}\n", identity("origin")),
		"access.csv":    string(access), "guardrails.csv": "",
		"egress.yaml": fmt.Sprintf("destinations:\n  - {host: %s, proto: tls, sni: strict, private: [127.0.0.1/32], route: {endpoints: [%q]}}\n", outside, far),
	}
}

// answers waits until the policy is in force everywhere.
func (m *mesh) answers(ctx context.Context, s settings) error {
	for _, door := range []string{doorIn, doorGateway} {
		o := m.honest(s, scene{door, kindIdle})
		o.Conns, o.Rate, o.Warm, o.For = 1, 10, 0, 50*time.Millisecond
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			c, err := m.load.Do(o, func() {})
			if err != nil {
				return err
			}
			if c.Failed == 0 {
				break
			}
			if ctx.Err() != nil || time.Now().After(end) {
				return fmt.Errorf("%s does not answer: %s", door, c.Fault)
			}
		}
	}
	return nil
}

// attacked is the process behind a door.
func (m *mesh) attacked(sc scene) *rig.Process {
	return map[string]*rig.Process{doorOut: m.client, doorIn: m.server, doorGateway: m.gate}[sc.door]
}

// honestConns is how many connections the other traffic has.
const honestConns = 16

// honest are the calls of the others, which pass the door.
func (m *mesh) honest(s settings, sc scene) order {
	o := order{Proxy: m.out, Host: origin, Conns: honestConns, Rate: s.rate, Warm: s.warm, For: s.each}
	if sc.door == doorGateway {
		o.Host, o.Roots = outside, filepath.Join(m.Dir, "ca.pem")
	}
	return o
}

// order is the attack.
func (m *mesh) order(s settings, sc scene) hostile {
	o := hostile{
		Door: sc.door, Kind: sc.kind, SVID: m.svid, Roots: filepath.Join(m.Dir, "ca.pem"), For: s.warm + s.each + 2*settle,
		Target: map[string]string{doorOut: m.out, doorIn: m.in, doorGateway: m.gateway}[sc.door],
		Conns:  map[string]int{kindIdle: s.crowd, kindLoris: s.slow, kindDeaf: s.deaf, kindResets: 8, kindRapid: 4, kindHopReset: 4}[sc.kind],
	}
	return o
}

// serveLoad makes calls, and starts the hostile program beside itself: both are
// the workload of the sidecar, which serves nobody else.
func serveLoad(socket string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, name := filepath.Split(socket)
	if _, err := rig.Spawn(dir, name+"-enemy", "nice", "-n", "19", self, "attack", socket+enemySuffix); err != nil {
		return err
	}
	return rig.ServeOrders(socket, order.run)
}

const enemySuffix = ".enemy"

// serveOrigin is the application behind the sidecar.
func serveOrigin(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	return answerOn(l)
}
