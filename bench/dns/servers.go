package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"sallyport/bench/rig"
)

// A server is what is asked.
type server struct {
	name, settings, port string
	proc                 *rig.Process
}

func allowedName(n int) string { return fmt.Sprintf("h%d.perf.test", n) }
func deniedName(n int) string  { return fmt.Sprintf("d%d.evil.test", n) }

// start writes the questions and starts the servers.
func (b *bench) start(ctx context.Context, w io.Writer) error {
	var mixed, denied strings.Builder
	for n := range b.names {
		fmt.Fprintf(&mixed, "%s A\n", allowedName(n))
		fmt.Fprintf(&denied, "%s A\n", deniedName(n))
		if n%9 == 8 {
			fmt.Fprintf(&mixed, "%s A\n", deniedName(n))
		}
	}
	for name, text := range map[string]string{"mixed": mixed.String(), "denied": denied.String()} {
		if _, err := b.File(name, text); err != nil {
			return err
		}
	}
	if err := b.startOurs(ctx); err != nil || b.profile != "" {
		return err
	}
	if err := b.startUnbound(ctx, w); err != nil {
		return err
	}
	return b.startDnsmasq(ctx)
}

// add keeps a server once it answers.
func (b *bench) add(ctx context.Context, s *server) error {
	b.AtEnd(s.proc.Stop)
	for end := time.Now().Add(30 * time.Second); ; {
		one, err := b.perf(ctx, s, scene{questions: "mixed", allowed: 0.9}, "-n", "1", "-t", "1")
		switch {
		case err == nil && one.bad == 0 && one.sent > 0:
			b.servers = append(b.servers, s)
			return nil
		case ctx.Err() != nil || time.Now().After(end):
			return fmt.Errorf("%s does not answer as it must: %d of %d: %w\n%s", s.name, one.bad, one.sent, err, s.proc.Log())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (b *bench) startOurs(ctx context.Context) error {
	id := "spiffe://" + rig.TrustDomain.Name() + "/ns/bench/sa/client"
	var access strings.Builder
	for n := range b.names {
		fmt.Fprintf(&access, "g2, host:%s, hosts:perf\n", allowedName(n))
	}
	fmt.Fprintf(&access, "p, perf, out, %s, hosts:perf, 443, CONNECT, -, -, allow\n", id)
	issuer, err := rig.Start(ctx, rig.Config{Program: b.issuer, Files: map[string]string{
		"entries.yaml":  fmt.Sprintf("entries:\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n", id, rig.Agent("client")),
		"services.yaml": "services: []\n", "access.csv": access.String(), "guardrails.csv": "", "egress.yaml": "destinations: []\n",
	}})
	if err != nil {
		return err
	}
	b.AtEnd(func() { _ = issuer.Close() })
	addr, err := rig.FreePort()
	if err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	proc, err := issuer.Sidecar(ctx, b.sidecar, "client", fmt.Sprintf("names: {listen: %q, self_test: off}\npprof: %v\n", addr, b.profile != ""), b.Self, "idle")
	if err != nil {
		return err
	}
	return b.add(ctx, &server{"ours", fmt.Sprintf("a sidecar, %d rows, with metrics and audit", b.names+1), port, proc})
}

// startUnbound keeps the number of threads that answers most.
func (b *bench) startUnbound(ctx context.Context, w io.Writer) error {
	most, threads := 0.0, 0
	for _, n := range []int{1, runtime.NumCPU()} {
		if err := b.unbound(ctx, n); err != nil {
			return err
		}
		s := b.servers[len(b.servers)-1]
		one, err := b.ask(ctx, s, scenes[0])
		if err != nil {
			return err
		}
		s.proc.Stop()
		b.servers = b.servers[:len(b.servers)-1]
		fmt.Fprintf(w, "tried unbound with %d threads: %.0f questions/s\n", n, one.perSecond())
		if one.perSecond() > most {
			most, threads = one.perSecond(), n
		}
	}
	return b.unbound(ctx, threads)
}

func (b *bench) unbound(ctx context.Context, threads int) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	var c strings.Builder
	fmt.Fprintf(&c, `server:
  interface: 127.0.0.1
  port: %s
  num-threads: %d
  so-reuseport: yes
  do-daemonize: no
  username: ""
  chroot: ""
  directory: ""
  pidfile: ""
  use-syslog: no
  verbosity: 0
  minimal-responses: yes
  local-zone: "." static
remote-control:
  control-enable: no
`, port, threads)
	c.WriteString("server:\n")
	for n := range b.names {
		fmt.Fprintf(&c, "  local-data: \"%s. 30 IN A 247.1.%d.%d\"\n", allowedName(n), n>>8&255, n&255)
	}
	file, err := b.File("unbound.conf", c.String())
	if err != nil {
		return err
	}
	proc, err := rig.Spawn(b.Dir, "unbound-"+port, "unbound", "-d", "-c", file)
	if err != nil {
		return err
	}
	return b.add(ctx, &server{"unbound", fmt.Sprintf("%s, %d threads, local-data, no log", version("unbound", "-V", "Version"), threads), port, proc})
}

func (b *bench) startDnsmasq(ctx context.Context) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	var hosts strings.Builder
	for n := range b.names {
		fmt.Fprintf(&hosts, "247.1.%d.%d %s\n", n>>8&255, n&255, allowedName(n))
	}
	file, err := b.File("hosts", hosts.String())
	if err != nil {
		return err
	}
	conf, err := b.File("dnsmasq.conf", fmt.Sprintf("port=%s\nlisten-address=127.0.0.1\nbind-interfaces\nno-resolv\nno-hosts\naddn-hosts=%s\nlocal=/test/\nlocal-ttl=30\nuser=root\npid-file=\n", port, file))
	if err != nil {
		return err
	}
	proc, err := rig.Spawn(b.Dir, "dnsmasq", "dnsmasq", "--keep-in-foreground", "--conf-file="+conf)
	if err != nil {
		return err
	}
	return b.add(ctx, &server{"dnsmasq", version("dnsmasq", "--version", "version") + ", addn-hosts, no log", port, proc})
}

// freePort is one that nobody listens on, over TCP nor UDP.
func freePort() (string, error) {
	for range 100 {
		addr, err := rig.FreePort()
		if err != nil {
			return "", err
		}
		if c, err := net.ListenPacket("udp", addr); err == nil {
			_, port, err := net.SplitHostPort(addr)
			return port, errors.Join(err, c.Close())
		}
	}
	return "", errors.New("no port is free")
}

// version is the line of a program's own words that has one of them.
func version(program, flag, word string) string {
	out, _ := exec.Command(program, flag).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, word) {
			line = strings.TrimSpace(strings.TrimPrefix(line, "Version"))
			line, _, _ = strings.Cut(line, " Copyright")
			return program + " " + strings.TrimSpace(strings.TrimPrefix(line, "Dnsmasq version"))
		}
	}
	return program
}
