package gwconformance

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/gateway-api/conformance/utils/roundtripper"
)

const (
	domain = "conformance.sallyport"
	// bound is how long anything here may take to begin.
	bound = 30 * time.Second
	// gatewayIP is where the caller's sidecar plays the Gateway, on port 80.
	gatewayIP = "127.0.0.77"
	// gateway is the service whose routes those of the Gateway are.
	gateway = "same-namespace"

	// The environment says where the programs are, and to this one, when it runs
	// as the workload of the Gateway's sidecar, where its world is.
	envWorld, envBin = "GWCONFORMANCE_WORLD", "GWCONFORMANCE_BIN"
)

// A backend is a service of the tests, with a sidecar of its own.
type backend struct {
	name, namespace string
	grpc            bool
	log             *os.File // of its pod
}

var backends = []backend{
	{"infra-backend-v1", "gateway-conformance-infra", false, nil},
	{"infra-backend-v2", "gateway-conformance-infra", false, nil},
	{"infra-backend-v3", "gateway-conformance-infra", false, nil},
	{"web-backend", "gateway-conformance-web-backend", false, nil},
	{"app-backend-v1", "gateway-conformance-app-backend", false, nil},
	{"app-backend-v2", "gateway-conformance-app-backend", false, nil},
	{"grpc-infra-backend-v1", "gateway-conformance-infra", true, nil},
	{"grpc-infra-backend-v2", "gateway-conformance-infra", true, nil},
	{"grpc-infra-backend-v3", "gateway-conformance-infra", true, nil},
}

// A world is an issuer, a sidecar before each backend, and one that plays the
// Gateway: its workload is this program, which runs the tests.
type world struct {
	dir, bin string
	issuer   string
	procs    []*exec.Cmd
	revision int // of the routes, one for each test
}

func (w *world) path(parts ...string) string {
	return filepath.Join(append([]string{w.dir}, parts...)...)
}

// run starts everything, and this program again as the workload of the Gateway's
// sidecar, whose status it returns.
func (w *world) run() (int, error) {
	defer w.stop()
	w.issuer = freeAddress()
	if err := w.policies(); err != nil {
		return 1, err
	}
	issuer := fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nlisten: %s\npolicies: %s\n", domain, w.path("issuer"), w.issuer, w.path("policies"))
	if err := w.start("issuer", issuer, "issuer"); err != nil {
		return 1, err
	}
	for _, b := range backends {
		var err error
		if b.log, err = os.OpenFile(w.path(b.pod()), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
			return 1, err
		}
		defer b.log.Close()
		app, err := b.serve()
		if err != nil {
			return 1, err
		}
		conf := fmt.Sprintf("inbound: {listen: %q, app: %q}\noutbound: {listen: %q}\n", freeAddress(), app, freeAddress())
		if b.grpc {
			conf = strings.Replace(conf, "app:", "app_protocol: h2c, app:", 1)
		}
		if err := w.sidecar(b.name, conf); err != nil {
			return 1, err
		}
	}
	conf := fmt.Sprintf("outbound:\n  listen: %q\n  upstreams:\n    - {service: %s, listen: \"%s:80\"}\n", freeAddress(), gateway, gatewayIP)
	return w.gateway(conf)
}

// gateway runs the tests behind the sidecar that plays the Gateway.
func (w *world) gateway(conf string) (int, error) {
	if err := w.config(gateway, conf); err != nil {
		return 1, err
	}
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	args := append([]string{"run", "--config", w.path(gateway, "config.yaml"), "--", self}, os.Args[1:]...)
	cmd := exec.Command(filepath.Join(w.bin, "sidecar"), args...)
	log, err := os.Create(w.path(gateway + ".log"))
	if err != nil {
		return 1, err
	}
	defer log.Close()
	cmd.Env = append(os.Environ(), envWorld+"="+w.dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, log
	if err := cmd.Run(); cmd.ProcessState == nil {
		return 1, err
	}
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		b, _ := os.ReadFile(log.Name()) // what cannot be read is not shown
		fmt.Fprintf(os.Stderr, "the sidecar of the Gateway printed:\n%s", b)
		return code, nil
	}
	return 0, nil
}

// policies writes who is who, and lets the Gateway call every backend.
func (w *world) policies() error {
	var services, entries, access strings.Builder
	services.WriteString("services:\n")
	entries.WriteString("entries:\n")
	add := func(name, namespace, selector string) string {
		id := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", domain, namespace, name)
		fmt.Fprintf(&services, "  - {name: %s, identity: %q, port: 8080, protocol: http}\n", name, id)
		fmt.Fprintf(&entries, "  - spiffe_id: %s\n    parent_id: spiffe://%s/spire/agent/join_token/%s\n    selectors: [%q]\n", id, domain, name, selector)
		return id
	}
	caller := add(gateway, "gateway-conformance-infra", "child:true")
	for _, b := range backends {
		fmt.Fprintf(&access, "p, %s, in, %s, %s, 8080, *, /**, -, allow\n", b.name, caller, add(b.name, b.namespace, "self:true"))
	}
	if err := os.MkdirAll(w.path("policies", "routes"), 0o700); err != nil {
		return err
	}
	for name, text := range map[string]string{"services.yaml": services.String(), "entries.yaml": entries.String(), "access.csv": access.String()} {
		if err := os.WriteFile(w.path("policies", name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) config(name, more string) error {
	out, err := w.sallyport("token", "create", name, "-o", "json")
	if err != nil {
		return err
	}
	var token struct{ Token, Value string }
	if err := json.Unmarshal(out, &token); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if err := os.MkdirAll(w.path(name), 0o700); err != nil {
		return err
	}
	conf := fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nissuer:\n  addresses: [%q]\n  bundle: %s\n  join_token: %s\ndrain: {timeout: 2s}\n%s",
		domain, w.path(name), w.issuer, w.path("issuer", "bundle.pem"), cmp.Or(token.Token, token.Value), more)
	return os.WriteFile(w.path(name, "config.yaml"), []byte(conf), 0o600)
}

func (w *world) sidecar(name, conf string) error {
	if err := w.config(name, conf); err != nil {
		return err
	}
	return w.start(name, "", "sidecar")
}

// start starts a program and waits until it is ready.
func (w *world) start(name, conf, program string) error {
	file := w.path(name, "config.yaml")
	if conf != "" {
		if err := os.MkdirAll(w.path(name), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			return err
		}
	}
	log, err := os.Create(w.path(name + ".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(w.bin, program), "run", "--config", file)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	w.procs = append(w.procs, cmd)
	admin := &http.Client{Timeout: time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", w.path(name, "run", "admin.sock"))
	}}}
	defer admin.CloseIdleConnections()
	for end := time.Now().Add(bound); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if resp, err := admin.Get("http://admin/readyz"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
	}
	b, _ := os.ReadFile(log.Name()) // what cannot be read is not shown
	return fmt.Errorf("%s is not ready after %s:\n%s", name, bound, b)
}

func (w *world) stop() {
	for _, p := range w.procs {
		_ = p.Process.Signal(syscall.SIGTERM) // it may have ended
	}
	for _, p := range w.procs {
		t := time.AfterFunc(bound, func() { _ = p.Process.Kill() })
		_ = p.Wait() // how it ended says nothing of the tests
		t.Stop()
	}
}

// sallyport runs the CLI.
func (w *world) sallyport(args ...string) ([]byte, error) {
	cmd := exec.Command(filepath.Join(w.bin, "sallyport"), append(args, "--socket", w.path("issuer", "run", "api.sock"))...)
	cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+w.path("state"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("sallyport %s: %w: %s%s", strings.Join(args, " "), err, out, &stderr)
	}
	return out, nil
}

// ports are tried once each, below the range from which the kernel takes ports for
// outgoing connections: nothing else takes one before the program that is told to
// listen on it.
var ports atomic.Uint32

func freeAddress() string {
	for range 1000 {
		addr := fmt.Sprintf("127.0.0.1:%d", 20000+(uint32(os.Getpid())*61+ports.Add(1))%12000)
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
	return "127.0.0.1:0" // which no program takes
}

// serve runs the application of a backend, which answers with what it has been
// asked, in the form that the tests of the Gateway API read.
func (b backend) serve() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	if b.grpc {
		go b.serveGRPC(l)
		return l.Addr().String(), nil
	}
	p := new(http.Protocols)
	p.SetHTTP1(true)
	go func() { _ = (&http.Server{Handler: http.HandlerFunc(b.echo), Protocols: p}).Serve(l) }()
	return l.Addr().String(), nil
}

func (b backend) pod() string { return b.name + "-abc12-xyz34" }

// failures are how often a call of a test has failed, by its uuid.
var failures struct {
	sync.Mutex
	of map[string]int
}

// fails says whether a call of a test of retries is to fail once more.
func fails(r *http.Request) bool {
	q := r.URL.Query()
	times, err := strconv.Atoi(q.Get("succeedAfter"))
	if err != nil {
		return false
	}
	failures.Lock()
	defer failures.Unlock()
	if failures.of == nil {
		failures.of = map[string]int{}
	}
	failures.of[q.Get("uuid")]++
	return failures.of[q.Get("uuid")] <= times
}

func (b backend) echo(w http.ResponseWriter, r *http.Request) {
	b.tell(r)
	if fails(r) {
		status, err := strconv.Atoi(r.URL.Query().Get("responseCode"))
		if err != nil {
			panic(http.ErrAbortHandler) // no status: the connection breaks off
		}
		w.WriteHeader(status)
		return
	}
	if d, err := time.ParseDuration(r.URL.Query().Get("delay")); err == nil {
		select {
		case <-time.After(d):
		case <-r.Context().Done():
			return
		}
	}
	for _, line := range strings.Split(r.Header.Get("X-Echo-Set-Header"), ",") {
		if name, value, ok := strings.Cut(line, ":"); ok {
			w.Header().Set(strings.TrimSpace(name), strings.TrimSpace(value))
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_ = json.NewEncoder(w).Encode(roundtripper.CapturedRequest{
		Path: r.RequestURI, Host: r.Host, Method: r.Method, Protocol: r.Proto, Headers: r.Header, Namespace: b.namespace, Pod: b.pod(),
	})
}

// run decides which part the program plays.
func run(m *testing.M) int {
	if os.Getenv(envWorld) != "" {
		code := m.Run()
		result.print()
		return code
	}
	bin, err := filepath.Abs(os.Getenv(envBin))
	if os.Getenv(envBin) == "" || err != nil {
		fmt.Fprintln(os.Stderr, envBin+" names no folder of programs; next: make gwconformance")
		return 2
	}
	if l, err := net.Listen("tcp", gatewayIP+":80"); err != nil {
		if os.Getenv("CI") == "" && errors.Is(err, syscall.EACCES) {
			fmt.Fprintln(os.Stderr, "skipped: the tests call port 80, which this user may not listen on")
			return 0
		}
		fmt.Fprintln(os.Stderr, err)
		return 1
	} else {
		l.Close()
	}
	dir, err := os.MkdirTemp("", "sp-gw-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	code, err := (&world{dir: dir, bin: bin}).run()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return code
}
