package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"sallyport/bench/rig"
)

// A proxy is one way out that is measured.
type proxy struct {
	name, settings string
	process        *rig.Process
	workers        bool // its children compute too
	order               // what is to be asked of it
}

// outside is the host that everybody asks for.
const outside = "origin.bench.test"

func identity(name string) string {
	return "spiffe://" + rig.TrustDomain.Name() + "/ns/bench/sa/" + name
}

// gate starts an issuer and a gateway with so many rows.
func (b *bench) gate(ctx context.Context, name string, rules int) (*proxy, error) {
	issuer, err := rig.Start(ctx, rig.Config{Program: b.issuer, Files: policy(rules, b.origin)})
	if err != nil {
		return nil, err
	}
	b.AtEnd(func() { _ = issuer.Close() }) // a directory that stays says so by itself
	listen, err := rig.FreePort()
	if err != nil {
		return nil, err
	}
	room := 2*b.idle + 1000
	conf := fmt.Sprintf("listen: %q\nlimits: {tunnels: %d, tunnels_per_workload: %[2]d}\n", listen, room)
	if b.profile != "" {
		conf += "pprof: true\n"
	}
	p := &proxy{name: name, settings: fmt.Sprintf("a gateway, %d rows, metrics and audit", rules)}
	if p.process, err = issuer.Gateway(ctx, b.gateway, "gateway", conf); err != nil {
		return nil, err
	}
	b.AtEnd(p.process.Stop)
	if err := p.process.Await(ctx, "tcp", listen); err != nil {
		return nil, err
	}
	var roots []byte
	for _, c := range issuer.Roots() {
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	for _, node := range []string{"server", "client"} {
		svid, err := issuer.Identity(ctx, "bench-"+node)
		if err != nil {
			return nil, err
		}
		var text []byte
		for _, der := range svid.Certificate {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
		if err != nil {
			return nil, err
		}
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
		if _, err := b.open(name+"-"+node+".pem", string(text)); err != nil {
			return nil, err
		}
	}
	if _, err := b.open(name+"-ca.pem", string(roots)); err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(b.origin)
	p.order = order{Proxy: listen, Host: net.JoinHostPort(outside, port), SVID: filepath.Join(b.Dir, name+"-client.pem"), Streams: true}
	return p, nil
}

// open writes a file that Squid may read when it is nobody any more.
func (b *bench) open(name, text string) (string, error) {
	path, err := b.File(name, text)
	return path, errors.Join(err, os.Chmod(path, 0o644)) //nolint:gosec // keys of a bench
}

func policy(rows int, origin string) map[string]string {
	var access, entries strings.Builder
	for n := range rows - 1 {
		fmt.Fprintf(&access, "p, out-%06d, out, **, host:api-%06[1]d.example.com, 443, CONNECT, -, -, allow\n", n)
	}
	fmt.Fprintf(&access, "p, out, out, %s, host:%s, *, CONNECT, -, -, allow\n", identity("client"), outside)
	entries.WriteString("entries:\n")
	for _, e := range [][3]string{{"gateway", "gateway", "self"}, {"peer", "bench-server", "child"}, {"client", "bench-client", "child"}} {
		fmt.Fprintf(&entries, "  - {spiffe_id: %q, parent_id: %q, selectors: [\"%s:true\"]}\n", identity(e[0]), rig.Agent(e[1]), e[2])
	}
	return map[string]string{
		"entries.yaml": entries.String(), "access.csv": access.String(), "guardrails.csv": "", "services.yaml": "services: []\n",
		"egress.yaml": fmt.Sprintf("destinations:\n  - {host: %s, proto: tcp, private: [127.0.0.1/32], route: {endpoints: [%q]}}\n", outside, origin),
	}
}

// squid starts Squid with the SVIDs of ours.
func (b *bench) squid(ctx context.Context) (*proxy, error) {
	listen, err := rig.FreePort()
	if err != nil {
		return nil, err
	}
	room := filepath.Join(b.Dir, "squid")
	if err := errors.Join(os.Chmod(b.Dir, 0o711), os.Mkdir(room, 0o700), os.Chmod(room, 0o777)); err != nil { //nolint:gosec // Squid insists on being somebody else
		return nil, err
	}
	var names strings.Builder
	for n := range b.rules - 1 {
		fmt.Fprintf(&names, "h%d.bench.test\n", n)
	}
	names.WriteString(outside + "\n")
	host, port, _ := net.SplitHostPort(b.origin)
	list, err1 := b.open("names.txt", names.String())
	hosts, err2 := b.open("hosts.txt", host+" "+outside+"\n")
	conf, err3 := b.open("squid.conf", fmt.Sprintf(`https_port %s tls-cert=%s/ours-server.pem clientca=%[2]s/ours-ca.pem tls-min-version=1.3 sslcontext=bench
acl names dstdomain "%s"
acl out port %s
http_access allow CONNECT names out
http_access deny all
hosts_file %s
cache deny all
cache_mem 8 MB
pid_filename %[6]s/squid.pid
access_log stdio:%[6]s/access.log
cache_log %[6]s/cache.log
coredump_dir %[6]s
shutdown_lifetime 1 second
pinger_enable off
max_filedescriptors 65536
`, listen, b.Dir, list, port, hosts, room))
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	p := &proxy{name: "squid", settings: version("squid", "-v") + ", https_port with client certificates, one worker, as it is by default, an access log"}
	p.order = order{Proxy: listen, Host: net.JoinHostPort(outside, port), SVID: filepath.Join(b.Dir, "ours-client.pem")}
	if p.process, err = rig.Spawn(b.Dir, "squid-out", "squid", "--foreground", "-f", conf); err != nil {
		return nil, err
	}
	p.workers = true
	b.AtEnd(p.process.Stop)
	if err := p.process.Await(ctx, "tcp", listen); err != nil {
		log, _ := os.ReadFile(filepath.Join(room, "cache.log"))
		return nil, fmt.Errorf("%w\n%s", err, log)
	}
	return p, nil
}

// tinyproxy starts tinyproxy, which verifies nobody.
func (b *bench) tinyproxy(ctx context.Context) (*proxy, error) {
	listen, err := rig.FreePort()
	if err != nil {
		return nil, err
	}
	_, at, _ := net.SplitHostPort(listen)
	_, port, _ := net.SplitHostPort(b.origin)
	conf, err := b.open("tinyproxy.conf", fmt.Sprintf("Port %s\nListen 127.0.0.1\nMaxClients 2000\nAllow 127.0.0.1\nConnectPort %s\nLogLevel Connect\nLogFile \"%s/tinyproxy.log\"\nTimeout 600\n", at, port, b.Dir))
	if err != nil {
		return nil, err
	}
	p := &proxy{name: "tinyproxy", settings: version("tinyproxy", "-v") + ", no TLS, one filter, a log"}
	p.order = order{Proxy: listen, Host: b.origin}
	if p.process, err = rig.Spawn(b.Dir, "tinyproxy-out", "tinyproxy", "-d", "-c", conf); err != nil {
		return nil, err
	}
	b.AtEnd(p.process.Stop)
	return p, p.process.Await(ctx, "tcp", listen)
}

// version is what a program says of itself.
func version(argv ...string) string {
	out, _ := exec.Command(argv[0], argv[1:]...).Output()
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}
