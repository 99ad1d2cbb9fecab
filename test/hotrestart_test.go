package test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A traffic is load of one kind, as a program beside a sidecar makes it.
type traffic struct {
	name         string
	made, failed atomic.Int64
	mu           sync.Mutex // guards why
	why          []string
}

// run makes one use after the other, several at a time, until stop is closed.
func (l *traffic) run(wg *sync.WaitGroup, stop <-chan struct{}, workers int, use func(worker, n int) error) {
	for w := range workers {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				l.made.Add(1)
				if err := use(w, n); err != nil {
					l.failed.Add(1)
					l.mu.Lock()
					if len(l.why) < 5 {
						l.why = append(l.why, fmt.Sprintf("%s: %v", time.Now().Format("05.000"), err))
					}
					l.mu.Unlock()
				}
			}
		})
	}
}

// A stage is a mesh whose workloads are the test itself: the sidecars have not
// started them, as with systemd.
type stage struct {
	*world
	out, stream string // doors of payment's sidecar
	site        *outside
	procs       map[string]*proc
	looked      int64 // calls to billing beside those of the load
}

// newStage starts payment, which calls billing over HTTP, inventory over TCP and
// the site through the gateway.
//
// The agents named more also serve what they are named after: "billing-2" is a
// second instance of billing.
func newStage(t *testing.T, svidTTL time.Duration, more ...string) *stage {
	t.Helper()
	s := &stage{world: newWorld(t, svidTTL), procs: map[string]*proc{}}
	self := fmt.Sprintf(`["unix:uid:%d"]`, os.Getuid())
	s.site = s.startOutside("api.stripe.test")
	s.routeOut(s.site)
	entries := "entries:\n"
	agents := append([]string{"gateway", "billing", "inventory", "payment"}, more...)
	for _, n := range agents {
		path, selectors := "/ns/shop/sa/"+kind(n), self
		if kind(n) == "gateway" {
			path, selectors = "/ns/edge/sa/gateway", `["self:true"]`
		}
		entries += fmt.Sprintf("  - {spiffe_id: %s, parent_id: %s, selectors: %s}\n", id(path), id("/spire/agent/join_token/"+n), selectors)
	}
	s.rewrite(s.path("policies", "entries.yaml"), entries)
	if err := os.RemoveAll(s.path("policies", "tests")); err != nil { // they speak of the demo
		t.Fatal(err)
	}
	s.rewrite(s.path("policies", "services.yaml"), fmt.Sprintf(`services:
  - {name: payment, identity: %s, port: 8443, protocol: http}
  - {name: billing, identity: %s, port: 8443, protocol: http}
  - {name: inventory, identity: %s, port: 5432, protocol: tcp}
`, id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"), id("/ns/shop/sa/inventory")))
	s.rewrite(s.path("policies", "guardrails.csv"), "")
	s.edit(0)
	s.startIssuer()

	web := httptest.NewServer(http.HandlerFunc(echo))
	t.Cleanup(web.Close)
	stock := serveEcho(t)
	var gateways []string
	for _, n := range agents {
		switch kind(n) {
		case "gateway":
			gateways = append(gateways, freePort(t))
			s.write(n, s.proxyConfig(n, s.token(n))+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", gateways[len(gateways)-1], freePort(t)))
		case "billing":
			s.write(n, s.stageConfig(n, strings.TrimPrefix(web.URL, "http://")))
		case "inventory":
			s.write(n, s.stageConfig(n, stock))
		}
	}
	s.out, s.stream = freePort(t), freePort(t)
	s.write("payment", s.proxyConfig("payment", s.token("payment"))+fmt.Sprintf("outbound:\n  listen: %s\n  upstreams:\n    - {service: inventory, listen: %q}\negress: {gateway: %s, addresses: [\"%s\"]}\n",
		s.out, s.stream, id("/ns/edge/sa/gateway"), strings.Join(gateways, `", "`)))
	for _, n := range agents {
		s.begin(n)
	}
	for _, p := range s.procs {
		s.awaitReady(p)
	}
	return s
}

// kind is what an agent is an instance of.
func kind(agent string) string {
	name, _, _ := strings.Cut(agent, "-")
	return name
}

// proxyConfig is that of the world, with time for what a busy machine does.
func (s *stage) proxyConfig(name, token string) string {
	return strings.Replace(s.world.proxyConfig(name, token), "drain: {timeout: 2s}", "drain: {timeout: 25s, outbound: 3s}", 1)
}

// begin starts a proxy.
func (s *stage) begin(name string) {
	s.t.Helper()
	s.procs[name] = s.start(name, nil, s.program(name), "run", "--config", s.path(name, "config.yaml"))
}

func (s *stage) program(name string) string {
	if kind(name) == "gateway" {
		return "gateway"
	}
	return "sidecar"
}

func (s *stage) stageConfig(name, app string) string {
	return s.proxyConfig(name, s.token(name)) + fmt.Sprintf("inbound: {listen: %q, app: %q}\n", freePort(s.t), app)
}

// edit changes the policy: it has n rows that nobody uses.
func (s *stage) edit(n int) {
	var b strings.Builder
	fmt.Fprintf(&b, "g2, host:api.stripe.test, hosts:payments\n")
	fmt.Fprintf(&b, "p, pay-bill, in, %s, %s, 8443, GET|POST, /v1/charges/**, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"))
	fmt.Fprintf(&b, "p, pay-stock, in, %s, %s, 5432, CONNECT, -, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/inventory"))
	fmt.Fprintf(&b, "p, pay-out, out, %s, hosts:payments, 443, CONNECT, -, env.sni=same, allow\n", id("/ns/shop/sa/payment"))
	for i := range n {
		fmt.Fprintf(&b, "p, spare-%d, in, %s, %s, 8443, GET, /v1/spare/%d, -, allow\n", i, id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"), i)
	}
	s.rewrite(s.path("policies", "access.csv"), b.String())
}

// load has payment's workload use all that it may until the returned function is
// called, which gives what came of it.
func (s *stage) load() func() []*traffic {
	web, streams, out := &traffic{name: "http"}, &traffic{name: "tcp streams"}, &traffic{name: "egress tunnels"}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	through := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.out}), MaxIdleConnsPerHost: 16}
	client := &http.Client{Transport: through, Timeout: within}
	web.run(&wg, stop, 6, func(_, n int) error {
		time.Sleep(5 * time.Millisecond) // a pace, not a wait for something
		var resp *http.Response
		var err error
		if n%2 == 0 {
			resp, err = client.Get("http://billing.mesh.internal/v1/charges")
		} else {
			resp, err = client.Post("http://billing.mesh.internal/v1/charges", "text/plain", strings.NewReader("charge"))
		}
		return answered(resp, err)
	})
	streams.run(&wg, stop, 3, func(_, n int) error { return s.useStream(n % 40) })
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(s.site.ca)
	if err != nil || !roots.AppendCertsFromPEM(pem) {
		s.t.Fatal("no certificate of the site", err)
	}
	out.run(&wg, stop, 3, func(_, n int) error {
		tr := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.out}), TLSClientConfig: &tls.Config{RootCAs: roots}}
		defer tr.CloseIdleConnections()
		c := &http.Client{Transport: tr, Timeout: within}
		for range 1 + n%20 {
			resp, err := c.Get("https://api.stripe.test/v1/charges")
			if err := answered(resp, err); err != nil {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
		return nil
	})
	halt := sync.OnceFunc(func() { close(stop); wg.Wait() })
	s.t.Cleanup(halt) // when the test fails before it
	return func() []*traffic {
		halt()
		through.CloseIdleConnections()
		return []*traffic{web, streams, out}
	}
}

func answered(resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, b)
	}
	return nil
}

// useStream says some lines and hears them again.
func (s *stage) useStream(lines int) error {
	c, err := net.Dial("tcp", s.stream)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(within))
	r := bufio.NewReader(c)
	for i := range lines + 1 {
		want := fmt.Sprintf("line %d\n", i)
		if _, err := io.WriteString(c, want); err != nil {
			return err
		}
		if got, err := r.ReadString('\n'); err != nil || got != want {
			return fmt.Errorf("line %d came back as %q: %w", i, got, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	_ = c.(*net.TCPConn).CloseWrite()
	if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the last line came %w", err)
	}
	return nil
}

// noneFailed prints what came of the load, and fails the test if any use failed.
func noneFailed(t *testing.T, all []*traffic) {
	t.Helper()
	for _, l := range all {
		t.Logf("%s: %d made, %d failed", l.name, l.made.Load(), l.failed.Load())
		if l.failed.Load() > 0 || l.made.Load() == 0 {
			t.Errorf("%s: %d of %d failed: %s", l.name, l.failed.Load(), l.made.Load(), strings.Join(l.why, "; "))
		}
	}
}

// takeOver starts another process of a proxy in the place of the one that runs,
// and waits until that one has ended in order.
func (s *stage) takeOver(name, program string) {
	s.t.Helper()
	old := s.procs[name]
	next := s.launch(name, nil, exec.Command(program, "run", "--config", s.path(name, "config.yaml"), "--takeover"))
	s.procs[name] = next
	if code := old.end(); code != 0 {
		s.t.Errorf("the old %s ended with status %d:\n%s", name, code, old.out)
	}
	next.await("take the duties over", func() bool { return strings.Contains(next.out.String(), "its duties are taken over") })
	s.awaitReady(next)
}

// TestHotRestart replaces every proxy under load, several times, while SVIDs
// rotate and policies change: nothing fails and no record is lost.
func TestHotRestart(t *testing.T) {
	t.Parallel()
	s := newStage(t, 20*time.Second)
	s.await("every way", func() bool { return s.reaches() })
	copies := map[string]string{}
	for _, p := range []string{"sidecar", "gateway"} {
		copies[p] = s.path(p + "-next") // another file, as after an upgrade
		if out, err := exec.Command("cp", filepath.Join(bin, p), copies[p]).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	done := s.load()
	restarts := 0
	for round := range 3 {
		s.edit(round + 1)
		for _, n := range []string{"billing", "payment", "gateway", "inventory"} {
			s.takeOver(n, copies[s.program(n)])
			restarts++
		}
	}
	for _, n := range []string{"billing", "payment", "gateway", "inventory"} {
		s.procs[n].await("renew its SVID", func() bool { return strings.Contains(s.procs[n].out.String(), "SVID renewed") })
	}
	all := done()
	t.Logf("%d restarts, every SVID renewed", restarts)
	noneFailed(t, all)
	for _, n := range []string{"gateway", "billing", "inventory"} { // payment judges nothing
		s.awaitVerified(s.path(n, "audit.jsonl"))
	}
	for _, p := range s.procs {
		if code := p.stop(); code != 0 {
			t.Errorf("%s ended with status %d", p.name, code)
		}
	}
	// Each call is in the log of the sidecar that judged it, once.
	if got, want := s.counted("billing"), s.looked+all[0].made.Load(); got != want {
		t.Errorf("billing's log counts %d calls, %d were made", got, want)
	}
}

// reaches says whether all three ways are open.
func (s *stage) reaches() bool {
	c := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.out}), DisableKeepAlives: true}, Timeout: within}
	if answered(c.Get("http://billing.mesh.internal/v1/charges")) != nil {
		return false
	}
	s.looked++
	if s.useStream(0) != nil {
		return false
	}
	conn, err := net.Dial("tcp", s.out)
	if err != nil {
		return false
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(within))
	fmt.Fprint(conn, "CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n")
	line, err := bufio.NewReader(conn).ReadString('\n')
	return err == nil && strings.Contains(line, " 200 ")
}

// counted is how many calls a log says were allowed.
func (s *stage) counted(name string) (n int64) {
	s.t.Helper()
	b, err := os.ReadFile(s.path(name, "audit.jsonl"))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var r struct {
			Kind, Decision, Detail string
			N                      int64
		}
		if json.Unmarshal(line, &r) == nil && r.Kind == "rollup" && r.Decision == "allow" && r.Detail == "" {
			n += r.N
		}
	}
	return n
}

// TestHotRestartBySignal has a sidecar start its own program anew.
func TestHotRestartBySignal(t *testing.T) {
	t.Parallel()
	s := newStage(t, time.Minute)
	s.await("every way", func() bool { return s.reaches() })
	// The new process writes where the old one did, which must be there after it.
	log, err := os.Create(s.path("signal.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p := s.procs["billing"]
	cmd := exec.Command(filepath.Join(bin, "sidecar"), "run", "--config", s.path("billing", "config.yaml"), "--takeover")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }) // and what it has started
	printed := func(text string, times int) func() bool {
		return func() bool {
			b, err := os.ReadFile(log.Name())
			return err == nil && bytes.Count(b, []byte(text)) >= times
		}
	}
	if code := p.end(); code != 0 {
		t.Errorf("the first one ended with %d", code)
	}
	s.await("take over", printed("its duties are taken over", 1))
	done := s.load()
	if err := cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the one that was told to start anew: %v", err)
	}
	s.await("take over again", printed("its duties are taken over", 2))
	s.takeOverFrom("billing")
	noneFailed(t, done())
}

// takeOverFrom takes over from a process that the test does not hold.
func (s *stage) takeOverFrom(name string) {
	s.t.Helper()
	next := s.start(name, nil, s.program(name), "run", "--config", s.path(name, "config.yaml"), "--takeover")
	s.procs[name] = next
	next.await("take the duties over", func() bool { return strings.Contains(next.out.String(), "its duties are taken over") })
}

// TestHotRestartThatFails has processes die that were to take over: the one that
// runs serves on.
func TestHotRestartThatFails(t *testing.T) {
	t.Parallel()
	s := newStage(t, time.Minute)
	s.await("every way", func() bool { return s.reaches() })
	conf, err := os.ReadFile(s.path("billing", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	try := func(conf string) *proc {
		s.put(s.path("try.yaml"), conf)
		return s.start("billing", nil, "sidecar", "run", "--config", s.path("try.yaml"), "--takeover")
	}
	app := string(conf[bytes.Index(conf, []byte("app: ")):])
	waits := strings.Replace(string(conf), app, fmt.Sprintf("app: %q}\n", freePort(t)), 1) // for an application that is not there
	done := s.load()

	for range 3 {
		p := try(waits)
		s.procs["billing"].await("hear of the other", func() bool {
			return strings.Count(s.procs["billing"].out.String(), "another process takes over") > strings.Count(s.procs["billing"].out.String(), "has gone")
		})
		if p := try(string(conf)); p.end() == 0 || !strings.Contains(p.out.String(), "another process is taking over already") {
			t.Errorf("a third process:\n%s", p.out)
		}
		p.kill()
		s.procs["billing"].await("see it die", func() bool {
			return strings.Count(s.procs["billing"].out.String(), "another process takes over") == strings.Count(s.procs["billing"].out.String(), "has gone")
		})
	}
	for name, c := range map[string]struct{ conf, want string }{
		"a mistake in the configuration": {strings.Replace(string(conf), "trust_domain", "trust_domian", 1), "trust_domian"},
		"another data_dir":               {strings.Replace(string(conf), "data_dir: ", fmt.Sprintf("run_dir: %s\ndata_dir: /elsewhere", s.path("billing", "run")), 1), "data_dir"},
		"an address that is taken":       {string(conf) + fmt.Sprintf("outbound: {listen: %s}\n", s.out), "outbound.listen"},
	} {
		if p := try(c.conf); p.end() == 0 || !strings.Contains(p.out.String(), c.want) {
			t.Errorf("%s: status %d:\n%s", name, p.cmd.ProcessState.ExitCode(), p.out)
		}
	}
	noneFailed(t, done())

	// One that dies after it has begun to serve takes with it what it carries, but
	// the old one serves again as long as it has not ended.
	c, err := net.Dial("tcp", s.stream)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	old := s.procs["payment"] // the stream keeps it alive
	fmt.Fprintln(c, "hello")
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	next := s.start("payment", nil, "sidecar", "run", "--config", s.path("payment", "config.yaml"), "--takeover")
	next.await("serve", func() bool { return strings.Contains(next.out.String(), "sidecar ready") })
	next.kill()
	old.await("serve again", func() bool { return s.reaches() })
	c.Close()
	s.takeOver("payment", filepath.Join(bin, "sidecar"))
}
