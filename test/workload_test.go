package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What tells the test binary, started as the program beside a sidecar, what to
// be. Names that begin with SALLYPORT_ are the sidecar's own settings.
const (
	envRole    = "E2E_ROLE"
	envControl = "E2E_CONTROL" // the Unix socket on which the test asks it
	envListen  = "E2E_LISTEN"  // where it serves clear HTTP, like any program
)

// playRole is main for such a process. The only role there is is a workload
// that does what it is asked on its control socket.
func playRole(role string) int {
	if role == roleCrash {
		return writeUntilKilled()
	}
	if role == roleShopper {
		return shop()
	}
	if role == roleLookUp {
		return lookUpGo()
	}
	if role == roleTunnels {
		return openTunnels()
	}
	if role == roleHealth {
		return askHealth()
	}
	if role != "workload" {
		fmt.Fprintf(os.Stderr, "no role %q\n", role)
		return 2
	}
	if err := (&workload{}).run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// A workload is an ordinary go-spiffe program: it finds the Workload API by
// SPIFFE_ENDPOINT_SOCKET and nothing else.
type workload struct {
	mu     sync.Mutex // guards source
	source *workloadapi.X509Source
}

// What the test may ask a workload.
type (
	runReply struct {
		Output string // of standard output and error
		Code   int
	}
	svidReply struct {
		ID         string
		Serial     string
		Expires    time.Time
		Leaf       string // PEM
		Rest       string // PEM, the intermediates
		Key        string // PEM
		BundlePEM  string
		BundleSize int
	}
	dialRequest struct{ Address, Want string }
	loadRequest struct {
		URL string
		For time.Duration
		// Every is the time between the beginnings of two calls.
		Every time.Duration
	}
	loadReply struct {
		Made, OK int
		Took     []time.Duration // of those that were OK
	}
)

func (w *workload) run() error {
	if addr := os.Getenv(envListen); addr != "" {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		go http.Serve(ln, http.HandlerFunc(echo)) //nolint:errcheck // ends with the process
	}
	mux := http.NewServeMux()
	answer(mux, "/run", w.exec)
	answer(mux, "/env", func(context.Context, struct{}) ([]string, error) { return os.Environ(), nil })
	answer(mux, "/svid", w.svid)
	answer(mux, "/jwt", w.jwt)
	answer(mux, "/rotation", w.rotation)
	answer(mux, "/serve", w.serve)
	answer(mux, "/dial", w.dial)
	answer(mux, "/load", w.load)
	answer(mux, "/say", say)
	ln, err := net.Listen("unix", os.Getenv(envControl))
	if err != nil {
		return err
	}
	return http.Serve(ln, mux)
}

// echo answers with what the application sees of a request. An upgraded
// connection it keeps until the other end closes it, and to /stream it answers
// for as long as somebody listens.
func echo(rw http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Sec-WebSocket-Key") != "" {
		if c, err := websocket.Accept(rw, r, nil); err == nil {
			_ = c.Write(r.Context(), websocket.MessageText, []byte("open"))
			<-c.CloseRead(r.Context()).Done()
			_ = c.CloseNow()
		}
		return
	}
	if r.Header.Get("Upgrade") == "websocket" { // in name only
		c, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nopen")
		_, _ = io.Copy(io.Discard, c)
		return
	}
	if strings.HasSuffix(r.URL.Path, "/stream") {
		stream(rw, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	rw.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(rw).Encode(map[string]any{
		"method": r.Method, "path": r.URL.Path, "host": r.Host, "body": string(body),
		"caller": r.Header.Get("X-Forwarded-Client-Cert"), "user": r.Header.Get("X-User"), "authorization": r.Header.Get("Authorization"),
	})
}

// stream sends events until the client is gone.
func stream(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", "text/event-stream")
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for http.NewResponseController(rw).Flush() == nil {
		select {
		case <-r.Context().Done():
			return
		case at := <-tick.C:
			fmt.Fprintf(rw, "data: %s\n\n", at.Format(time.RFC3339Nano))
		}
	}
}

// answer makes a function that takes and gives JSON.
func answer[Q, R any](mux *http.ServeMux, path string, f func(context.Context, Q) (R, error)) {
	mux.HandleFunc(path, func(rw http.ResponseWriter, r *http.Request) {
		var q Q
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		reply, err := f(r.Context(), q)
		if err != nil {
			http.Error(rw, err.Error(), http.StatusConflict)
			return
		}
		_ = json.NewEncoder(rw).Encode(reply)
	})
}

// exec runs a command, which is then a descendant of the sidecar's child.
func (w *workload) exec(ctx context.Context, argv []string) (runReply, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if e := (*exec.ExitError)(nil); errors.As(err, &e) {
		err = nil
	}
	return runReply{out.String(), cmd.ProcessState.ExitCode()}, err
}

func (w *workload) svid(ctx context.Context, _ struct{}) (r svidReply, err error) {
	x, err := workloadapi.FetchX509Context(ctx)
	if err != nil {
		return r, err
	}
	id := x.DefaultSVID()
	key, err := x509.MarshalPKCS8PrivateKey(id.PrivateKey)
	if err != nil {
		return r, err
	}
	bundle, err := x.Bundles.GetX509BundleForTrustDomain(id.ID.TrustDomain())
	if err != nil {
		return r, err
	}
	roots := bundle.X509Authorities()
	leaf := id.Certificates[0]
	return svidReply{
		ID: id.ID.String(), Serial: leaf.SerialNumber.Text(16), Expires: leaf.NotAfter,
		Leaf: certsPEM(leaf), Rest: certsPEM(id.Certificates[1:]...),
		Key:       string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		BundlePEM: certsPEM(roots...), BundleSize: len(roots),
	}, nil
}

// jwt fetches a JWT-SVID for an audience.
func (w *workload) jwt(ctx context.Context, audience string) (string, error) {
	s, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return "", err
	}
	return s.Marshal(), nil
}

func certsPEM(cs ...*x509.Certificate) string {
	var b bytes.Buffer
	for _, c := range cs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.String()
}

// rotation watches until n different certificates have come, and gives their
// serial numbers.
func (w *workload) rotation(ctx context.Context, n int) ([]string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	seen := &serials{want: n, done: cancel}
	err := workloadapi.WatchX509Context(ctx, seen)
	if len(seen.got) >= n {
		return seen.got, nil
	}
	return nil, errors.Join(err, seen.err)
}

type serials struct {
	want int
	done func()
	got  []string
	err  error
}

func (s *serials) OnX509ContextUpdate(x *workloadapi.X509Context) {
	serial := x.DefaultSVID().Certificates[0].SerialNumber.Text(16)
	if len(s.got) == 0 || s.got[len(s.got)-1] != serial {
		s.got = append(s.got, serial)
	}
	if len(s.got) == s.want {
		s.done()
	}
}

func (s *serials) OnX509ContextWatchError(err error) { s.err = err }

func (w *workload) x509Source(ctx context.Context) (*workloadapi.X509Source, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.source != nil {
		return w.source, nil
	}
	var err error
	w.source, err = workloadapi.NewX509Source(context.WithoutCancel(ctx))
	return w.source, err
}

// serve opens a server of go-spiffe's making that lets in the caller named.
func (w *workload) serve(ctx context.Context, caller string) (string, error) {
	id, err := spiffeid.FromString(caller)
	if err != nil {
		return "", err
	}
	src, err := w.x509Source(ctx)
	if err != nil {
		return "", err
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(src, src, tlsconfig.AuthorizeID(id)))
	if err != nil {
		return "", err
	}
	go http.Serve(ln, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { //nolint:errcheck // ends with the process
		fmt.Fprintf(rw, "hello %s", r.TLS.PeerCertificates[0].URIs[0])
	}))
	return ln.Addr().String(), nil
}

// load calls through the proxy of the environment, at a rate.
func (w *workload) load(ctx context.Context, q loadRequest) (r loadReply, err error) {
	c := &http.Client{Timeout: 10 * time.Second}
	tick := time.NewTicker(q.Every)
	defer tick.Stop()
	for end := time.Now().Add(q.For); time.Now().Before(end); r.Made++ {
		begin := time.Now()
		resp, err := c.Get(q.URL)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if err == nil && resp.StatusCode == http.StatusOK {
				r.OK++
				r.Took = append(r.Took, time.Since(begin))
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return r, ctx.Err()
		}
	}
	return r, nil
}

// dial calls such a server.
func (w *workload) dial(ctx context.Context, q dialRequest) (string, error) {
	want, err := spiffeid.FromString(q.Want)
	if err != nil {
		return "", err
	}
	src, err := w.x509Source(ctx)
	if err != nil {
		return "", err
	}
	t := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(want))}
	defer t.CloseIdleConnections()
	resp, err := (&http.Client{Transport: t}).Get("https://" + q.Address)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// A hand is the test's hold of a workload.
type hand struct {
	*proc
	client *http.Client
}

// ask has the workload do something and fails the test when it cannot.
func ask[R any](h *hand, path string, q any) R {
	h.t.Helper()
	r, err := try[R](h, path, q)
	if err != nil {
		h.t.Fatalf("%s: %s: %v", h.name, path, err)
	}
	return r
}

// try is ask for what may go wrong.
func try[R any](h *hand, path string, q any) (r R, err error) {
	h.t.Helper()
	body, err := json.Marshal(q)
	if err != nil {
		return r, err
	}
	resp, err := h.client.Post("http://workload"+path, "application/json", bytes.NewReader(body))
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return r, err
	}
	if resp.StatusCode != http.StatusOK {
		return r, errors.New(string(b))
	}
	return r, json.Unmarshal(b, &r)
}

// startWorkload starts a sidecar with the workload as its child, from the
// configuration file that is there, and waits until both serve.
func (w *world) startWorkload(name string, env ...string) *hand {
	w.t.Helper()
	return w.startWorkloadBy(name, nil, env...)
}

// startWorkloadBy is startWorkload with a command before that of the sidecar,
// which ends in executing it.
func (w *world) startWorkloadBy(name string, by []string, env ...string) *hand {
	w.t.Helper()
	self := w.program
	if self == "" {
		var err error
		if self, err = os.Executable(); err != nil {
			w.t.Fatal(err)
		}
	}
	socket := w.path(name, "control.sock")
	_ = os.Remove(socket) // of a workload before this one
	env = append(env, envRole+"=workload", envControl+"="+socket)
	args := append(slices.Clone(by), w.programOf(name, "sidecar"), "run", "--config", w.path(name, "config.yaml"))
	args = append(append(args, w.flags...), "--", self)
	p := w.launch(name, env, exec.Command(args[0], args[1:]...))
	h := &hand{proc: p, client: &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}, Timeout: within}}
	w.t.Cleanup(h.client.CloseIdleConnections)
	w.awaitReady(p)
	p.await("have a child that answers", func() bool {
		_, err := try[[]string](h, "/env", struct{}{})
		return err == nil
	})
	return h
}

func id(path string) string { return "spiffe://" + trustDomain + path }

func TestWorkloadAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 10*time.Second)
	w.startIssuer()
	w.write("payment", w.proxyConfig("payment", w.token("payment")))
	w.write("billing", w.proxyConfig("billing", w.token("billing")))
	payment, billing := w.startWorkload("payment"), w.startWorkload("billing")

	t.Run("a child gets its identity", func(t *testing.T) {
		got := ask[svidReply](payment, "/svid", struct{}{})
		if want := id("/ns/shop/sa/payment"); got.ID != want {
			t.Errorf("SVID is for %s, want %s", got.ID, want)
		}
		if left := time.Until(got.Expires); left <= 0 || left > 11*time.Second {
			t.Errorf("SVID ends in %s, want at most 10 s", left)
		}
		if got.BundleSize != 1 {
			t.Errorf("the bundle has %d roots, want 1", got.BundleSize)
		}
	})
	t.Run("a stream sees rotations", func(t *testing.T) {
		got := ask[[]string](payment, "/rotation", 3)
		if got[0] == got[1] || got[1] == got[2] || got[0] == got[2] {
			t.Errorf("serial numbers came twice: %v", got)
		}
	})
	t.Run("two workloads speak mutual TLS", func(t *testing.T) {
		addr := ask[string](billing, "/serve", id("/ns/shop/sa/payment"))
		got := ask[string](payment, "/dial", dialRequest{addr, id("/ns/shop/sa/billing")})
		if want := "hello " + id("/ns/shop/sa/payment"); got != want {
			t.Errorf("the server said %q, want %q", got, want)
		}
	})
	t.Run("a client refuses a server that is somebody else", func(t *testing.T) {
		addr := ask[string](billing, "/serve", id("/ns/shop/sa/payment"))
		if got, err := try[string](payment, "/dial", dialRequest{addr, id("/ns/shop/sa/inventory")}); err == nil {
			t.Errorf("it took billing for inventory: %s", got)
		}
	})
	t.Run("a server refuses a client that is somebody else", func(t *testing.T) {
		addr := ask[string](billing, "/serve", id("/ns/shop/sa/web"))
		if got, err := try[string](payment, "/dial", dialRequest{addr, id("/ns/shop/sa/billing")}); err == nil {
			t.Errorf("it took payment for web: %s", got)
		}
	})
	t.Run("a process that is no child gets nothing", func(t *testing.T) {
		socket := workloadapi.WithAddr("unix://" + w.path("payment", "run", "workload.sock"))
		_, err := workloadapi.FetchX509SVID(t.Context(), socket)
		if got := status.Code(err); got != codes.PermissionDenied {
			t.Errorf("the answer is %s (%v), want PermissionDenied", got, err)
		}
		w.awaitAudit("payment", "the refusal", func(r auditLine) bool {
			return r.Kind == "attest" && r.Decision == "deny" && r.Reason == "no_identity"
		})
	})
}
