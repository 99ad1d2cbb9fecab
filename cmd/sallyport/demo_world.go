package main

import (
	"context"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/control"
	"sallyport/policies"
)

func (d *demo) apiSocket() string { return filepath.Join(d.dir, "issuer", "run", "api.sock") }

func (d *demo) adminSocket(name string) string {
	return filepath.Join(d.dir, name, "run", "admin.sock")
}

func (d *demo) auditFile(name string) string { return filepath.Join(d.dir, name, "audit.jsonl") }

// writePolicies copies the reviewed policies, and points the one external host
// that may be reached at the server that plays it.
func (d *demo) writePolicies() error {
	root := filepath.Join(d.dir, "policies")
	return fs.WalkDir(policies.FS, ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := filepath.Join(root, path)
		if e.IsDir() {
			return os.MkdirAll(to, 0o700)
		}
		b, err := fs.ReadFile(policies.FS, path)
		if err != nil {
			return err
		}
		if path == "egress.yaml" {
			b = fmt.Appendf(b, "    route: {endpoints: [%q]}\n", d.net.Sites["api.stripe.test"].Addr.String())
		}
		return os.WriteFile(to, b, 0o600)
	})
}

func (d *demo) startIssuer(ctx context.Context) error {
	home := filepath.Join(d.dir, "issuer")
	conf := fmt.Sprintf(`trust_domain: %s
data_dir: %s
listen: %s
policies: %s
page:
  listen: %s
ca:
  x509_ttl: %s
  jwt_ttl: 10s
  agent_ttl: 1m
  allow_short_ttl: true
`, demoTrustDomain, home, d.issuerAddr, filepath.Join(d.dir, "policies"), d.pageAddr, demoSVIDLife)
	if err := d.writeConfig("issuer", conf); err != nil {
		return err
	}
	if err := d.spawn("issuer", []string{"issuer", "run"}, nil); err != nil {
		return err
	}
	return d.awaitReady(ctx, "issuer")
}

func (d *demo) writeConfig(name, conf string) error {
	if err := os.MkdirAll(filepath.Join(d.dir, name), 0o700); err != nil {
		return err
	}
	return os.WriteFile(d.configFile(name), []byte(conf), 0o600)
}

func (d *demo) configFile(name string) string { return filepath.Join(d.dir, name, "config.yaml") }

// spawn starts argv (a program of ours, its verb) with the program's
// configuration, followed by tail.
func (d *demo) spawn(name string, argv, tail []string, env ...string) error {
	full := append([]string{filepath.Join(d.bin, argv[0])}, argv[1:]...)
	full = append(append(full, "--config", d.configFile(name)), tail...)
	p := &process{
		name: name, argv: full, env: append(os.Environ(), env...),
		log: filepath.Join(d.dir, name, "log.jsonl"),
	}
	if err := p.start(d.rec.event); err != nil {
		return err
	}
	d.proc[name] = p
	return nil
}

// startProxy joins the sidecar or gateway called name to the mesh: a token of
// its own, a configuration, the process.
func (d *demo) startProxy(ctx context.Context, name string, config func(name, token string) string, argv ...string) error {
	admin, err := control.DialAdmin(d.apiSocket())
	if err != nil {
		return err
	}
	defer admin.Close()
	token, err := admin.CreateJoinToken(ctx, name, 10*time.Minute)
	if err != nil {
		return err
	}
	if err := d.writeConfig(name, config(name, token.Value)); err != nil {
		return err
	}
	if name == "gateway" {
		return d.spawn(name, argv, nil)
	}
	ca := filepath.Join(d.dir, name, "internet-ca.pem")
	if err := os.WriteFile(ca, d.net.CA, 0o600); err != nil {
		return err
	}
	env := []string{"SSL_CERT_FILE=" + ca, envEvery + "=" + d.every.String()}
	if a, ok := d.app[name]; ok {
		env = append(env, envAppListen+"="+a.String())
	}
	if d.isolated == name {
		env = append(env, envIsolated+"=1")
	}
	env = append(env, d.workload(name).env...)
	tail := []string{"--", filepath.Join(d.bin, "sallyport"), "demo-app", name}
	return d.spawn(name, argv, tail, env...)
}

func (d *demo) joinConfig(name, token string) string {
	return fmt.Sprintf(`trust_domain: %s
data_dir: %s
issuer:
  addresses: ["%s"]
  bundle: %s
  join_token: %s
drain:
  timeout: 3s
`, demoTrustDomain, filepath.Join(d.dir, name), d.issuerAddr, filepath.Join(d.dir, "issuer", "bundle.pem"), token)
}

func (d *demo) gatewayConfig(name, token string) string {
	return d.joinConfig(name, token) + fmt.Sprintf("listen: %s\nresolvers: [\"%s\"]\n", d.gatewayAddr, d.net.DNS)
}

func (d *demo) sidecarConfig(name, token string) string {
	c := d.joinConfig(name, token) + fmt.Sprintf(`outbound:
  listen: %s
egress:
  gateway: spiffe://%s/ns/edge/sa/gateway
  addresses: ["%s"]
`, d.outbound[name], demoTrustDomain, d.gatewayAddr)
	if a, ok := d.app[name]; ok {
		c += fmt.Sprintf("inbound:\n  listen: %s\n  app: %s\n", d.inbound[name], a)
		if d.workload(name).grpc {
			c += "  app_protocol: h2c\n"
		}
	}
	return c + d.workload(name).config
}

// live is the demo that is looked at: its programs try what deeds will allow, and
// one of them knows of no proxy.
func (d *demo) live() error {
	d.give("web", envPartner+"=1")
	d.isolated = "batch"
	return nil
}

// startSidecar starts the sidecar of a workload. Where users may have namespaces,
// the program of the isolated one begins in one of its own; where not, its proxy is
// in its environment, as with the others, and that is said.
func (d *demo) startSidecar(ctx context.Context, name string) error {
	if d.isolated != name {
		return d.startProxy(ctx, name, d.sidecarConfig, "sidecar", "run")
	}
	err := d.startProxy(ctx, name, d.isolatedConfig, "sidecar", "run", "--isolate")
	if err == nil {
		soon, cancel := context.WithTimeout(ctx, stepWithin)
		err = d.awaitReady(soon, name)
		cancel()
	}
	if err == nil && !d.rec.await(name+" report", 1, stepWithin) {
		err = fmt.Errorf("its calls do not arrive: %+v", d.rec.failures(name+" report"))
	}
	if err == nil {
		d.how = "in a network namespace of its own, and knows of no proxy: all that it opens arrives at its sidecar"
		delete(d.outbound, name) // a port of that namespace
		return nil
	}
	why := firstLine(err.Error())
	if strings.Contains(err.Error(), "namespace") {
		why = "users may have none here"
	}
	d.how = fmt.Sprintf("%s is without a network namespace of its own (%s): its proxy is in its environment", name, why)
	d.isolated = ""
	if p := d.proc[name]; p != nil {
		_ = p.stop(demoStopWithin) // it has ended, or was killed
	}
	return d.startProxy(ctx, name, d.sidecarConfig, "sidecar", "run")
}

// isolatedConfig also answers for names. What the resolver of this machine asks
// besides is of no importance to the demo.
func (d *demo) isolatedConfig(name, token string) string {
	return d.sidecarConfig(name, token) + fmt.Sprintf("names:\n  listen: %s\n  self_test: \"off\"\n", d.names)
}

// workload is the one of that name.
func (d *demo) workload(name string) demoWorkload {
	all := slices.Concat(d.workloads, d.later)
	return all[slices.IndexFunc(all, func(w demoWorkload) bool { return w.name == name })]
}

// give adds variables to the environment of a workload's program.
func (d *demo) give(name string, env ...string) {
	i := slices.IndexFunc(d.workloads, func(w demoWorkload) bool { return w.name == name })
	d.workloads[i].env = append(slices.Clone(d.workloads[i].env), env...)
}

// join starts a workload that comes later, and leave ends it; its ports are then
// anybody's.
func (d *demo) join(ctx context.Context, name string) error {
	if err := d.reserve([]demoWorkload{d.workload(name)}); err != nil {
		return err
	}
	if err := d.startProxy(ctx, name, d.sidecarConfig, "sidecar", "run"); err != nil {
		d.forget(name)
		return err
	}
	return d.awaitReady(ctx, name)
}

func (d *demo) leave(name string) error {
	p := d.proc[name]
	delete(d.proc, name)
	defer d.forget(name)
	return p.stop(demoStopWithin)
}

// forget gives up the ports of a workload.
func (d *demo) forget(name string) {
	for _, of := range []map[string]netip.AddrPort{d.outbound, d.inbound, d.app} {
		d.release(of[name])
		delete(of, name)
	}
}

// startAttacker starts a program that has neither sidecar nor identity.
func (d *demo) startAttacker() error {
	if err := os.MkdirAll(filepath.Join(d.dir, "attacker"), 0o700); err != nil {
		return err
	}
	p := &process{
		name: "attacker",
		argv: []string{filepath.Join(d.bin, "sallyport"), "demo-app", "attacker"},
		env: append(os.Environ(), envEvery+"=1s", envTrustDomain+"="+demoTrustDomain,
			envVictimTLS+"="+d.inbound["billing"].String(), envVictimProxy+"="+d.outbound["payment"].String()),
		log: filepath.Join(d.dir, "attacker", "log.jsonl"),
	}
	if err := p.start(d.rec.event); err != nil {
		return err
	}
	d.proc[p.name] = p
	return nil
}
