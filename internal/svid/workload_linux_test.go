package svid

import (
	"bufio"
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"sallyport/internal/capture"
)

// The test binary plays the other process: SVID_ROLE says which.
func TestMain(m *testing.M) {
	role := os.Getenv("SVID_ROLE")
	if role == "" {
		os.Exit(m.Run())
	}
	if err := play(role, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func play(role string, args []string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0) // kept over exec
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: args[0]}); err != nil {
		return err
	}
	fmt.Println("connected")
	in := bufio.NewReader(os.Stdin)
	switch role {
	case "hand-over": // fd 3 is the way to the thief
		if err := unix.Sendmsg(3, []byte{1}, unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
	case "write-ahead": // the request, then the connection to the thief, then the rightful program
		req, err := hex.DecodeString(args[1])
		if err != nil {
			return err
		}
		if _, err := unix.Write(fd, req); err != nil {
			return err
		}
		if err := unix.Sendmsg(3, []byte{1}, unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		return syscall.Exec(args[2], args[2:], os.Environ())
	case "exec":
		in.ReadString('\n')
		return syscall.Exec(args[1], args[1:], os.Environ())
	}
	in.ReadString('\n')
	return nil
}

func start(t *testing.T, role string, extra []*os.File, args ...string) (*exec.Cmd, io.WriteCloser) {
	t.Helper()
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append(os.Environ(), "SVID_ROLE="+role)
	c.ExtraFiles, c.Stderr = extra, os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); c.Process.Kill(); c.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "connected\n" {
		t.Fatalf("other process said %q, %v", line, err)
	}
	return c, in
}

// An attestor answers with what the test set.
type attestor struct {
	entries atomic.Pointer[[]string]
	asked   atomic.Int64
	do      func(capture.Process) // called first when set
}

func (a *attestor) Attest(_ context.Context, p capture.Process) ([]string, error) {
	a.asked.Add(1)
	if a.do != nil {
		a.do(p)
	}
	if e := a.entries.Load(); e != nil {
		return *e, nil
	}
	return nil, errors.New("attestation is broken")
}

func entitled(entries ...string) *attestor {
	a := &attestor{}
	a.entries.Store(&entries)
	return a
}

type jwtMinter struct{}

func (jwtMinter) MintJWT(_ context.Context, entryID string, aud []string) (string, error) {
	if aud[0] == "down" {
		return "", errors.New("issuer is down")
	}
	return "token of " + entryID + " for " + strings.Join(aud, "+"), nil
}

type served struct {
	path string
	api  *WorkloadAPI
	src  *Source
	ca   *testCA
}

func serve(t *testing.T, a *attestor, change func(*WorkloadConfig), who ...spiffeid.ID) served {
	t.Helper()
	ca := newCA(t, td)
	src := ca.source(who...)
	cfg := WorkloadConfig{Source: src, Attest: a, JWT: jwtMinter{}, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	api, err := NewWorkloadAPI(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := capture.ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- api.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		api.mu.Lock()
		defer api.mu.Unlock()
		if len(api.streams) > 0 {
			t.Errorf("calls still counted: %v", api.streams)
		}
	})
	return served{path, api, src, ca}
}

func (s served) dial(t *testing.T, opts ...grpc.DialOption) workload.SpiffeWorkloadAPIClient {
	t.Helper()
	cc, err := grpc.NewClient("unix://"+s.path, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return workload.NewSpiffeWorkloadAPIClient(cc)
}

func header(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, securityHeader, "true")
}

func TestWorkloadAPIServesGoSPIFFE(t *testing.T) {
	s := serve(t, entitled("entry/a", "entry/b"), nil, id("/a"), id("/b"), id("/c"))
	ctx := header(t)
	c, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+s.path))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	svids, err := c.FetchX509SVIDs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range svids {
		got = append(got, v.ID.Path())
		if _, err := VerifyChain(v.Certificates, s.ca.bundle(), time.Now()); err != nil {
			t.Error(err)
		}
	}
	if strings.Join(got, " ") != "/a /b" {
		t.Errorf("identities %v: only those the caller is entitled to, first first", got)
	}
	bundles, err := c.FetchX509Bundles(ctx)
	if err != nil || !bundles.Has(td) {
		t.Errorf("X.509 bundles: %v", err)
	}
	jwts, err := c.FetchJWTBundles(ctx)
	if err != nil || !jwts.Has(td) {
		t.Errorf("JWT bundles: %v", err)
	}
}

func TestStreamFollowsTheState(t *testing.T) {
	a := entitled("entry/a")
	s := serve(t, a, nil, id("/a"))
	stream, err := s.dial(t).FetchX509SVID(header(t), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	one, err := stream.Recv()
	if err != nil || len(one.Svids) != 1 {
		t.Fatal(one, err)
	}
	far := newCA(t, spiffeid.RequireTrustDomainFromString("example.net"))
	next := s.ca.identity(id("/a"), time.Hour)
	twin := s.ca.identity(id("/a2"), time.Hour)
	next.Hint, twin.Hint, twin.EntryID = "internal", "internal", "entry/a"
	next.FederatesWith = []spiffeid.TrustDomain{far.td}
	third := newCA(t, spiffeid.RequireTrustDomainFromString("third.example")) // no entry of the caller names it
	if err := s.src.Set(&State{Bundle: s.ca.bundle(), Identities: []Identity{next, twin},
		Federated: map[spiffeid.TrustDomain]*x509bundle.Bundle{far.td: far.bundle(), third.td: third.bundle()}}); err != nil {
		t.Fatal(err)
	}
	two, err := stream.Recv()
	if err != nil || len(two.Svids) != 2 || string(two.Svids[0].X509Svid) == string(one.Svids[0].X509Svid) {
		t.Fatalf("after rotation: %v", err)
	}
	if two.Svids[0].Hint != "internal" || two.Svids[1].Hint != "" {
		t.Errorf("hints %q and %q: they must be unique", two.Svids[0].Hint, two.Svids[1].Hint)
	}
	if string(two.FederatedBundles["spiffe://example.net"]) != string(far.root.Raw) || len(two.FederatedBundles) != 1 {
		t.Error("the federated bundle is missing")
	}
	if a.asked.Load() != 2 {
		t.Errorf("attested %d times for 2 messages", a.asked.Load())
	}
	none := []string{}
	a.entries.Store(&none)
	if err := s.src.Set(&State{Bundle: s.ca.bundle()}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the entitlement ended: %v", err)
	}
}

func TestWorkloadAPIRefuses(t *testing.T) {
	type call func(context.Context, workload.SpiffeWorkloadAPIClient) error
	x509svid := func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
		s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
	x509bundles := func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
		s, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
	jwtbundles := func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
		s, err := c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
	jwt := func(who string, aud ...string) call {
		return func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
			_, err := c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: aud, SpiffeId: who})
			return err
		}
	}
	wit := func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) error {
		s, err := c.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
	plain := context.Background()
	for _, c := range []struct {
		name string
		ctx  func() context.Context
		a    *attestor
		conf func(*WorkloadConfig)
		call call
		want codes.Code
	}{
		{"X.509-SVID without security header", func() context.Context { return plain }, entitled("entry/a"), nil, x509svid, codes.InvalidArgument},
		{"bundles without security header", func() context.Context { return plain }, entitled("entry/a"), nil, x509bundles, codes.InvalidArgument},
		{"JWT without security header", func() context.Context { return plain }, entitled("entry/a"), nil, jwt("", "x"), codes.InvalidArgument},
		{"another value of the header", func() context.Context { return metadata.AppendToOutgoingContext(plain, securityHeader, "True") }, entitled("entry/a"), nil, x509svid, codes.InvalidArgument},
		{"the header twice", func() context.Context { return metadata.AppendToOutgoingContext(header(t), securityHeader, "true") }, entitled("entry/a"), nil, x509svid, codes.InvalidArgument},
		{"no identity", nil, entitled(), nil, x509svid, codes.PermissionDenied},
		{"an entry that has no identity here", nil, entitled("entry/z"), nil, x509svid, codes.PermissionDenied},
		{"bundles without identity", nil, entitled(), nil, x509bundles, codes.PermissionDenied},
		{"JWT bundles without identity", nil, entitled(), nil, jwtbundles, codes.PermissionDenied},
		{"JWT without identity", nil, entitled(), nil, jwt("", "x"), codes.PermissionDenied},
		{"attestation fails", nil, &attestor{}, nil, x509svid, codes.PermissionDenied},
		{"attestation panics", nil, &attestor{do: func(capture.Process) { panic("boom") }}, nil, x509svid, codes.Internal},
		{"attestation panics in a unary call", nil, &attestor{do: func(capture.Process) { panic("boom") }}, nil, jwt("", "x"), codes.Internal},
		{"before the first state", nil, entitled("entry/a"), func(c *WorkloadConfig) { c.Source = NewSource() }, x509svid, codes.Unavailable},
		{"own SVID expired", nil, entitled("entry/a"), func(c *WorkloadConfig) {
			c.Source.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
		}, x509svid, codes.PermissionDenied},
		{"audit fails", nil, entitled("entry/a"), func(c *WorkloadConfig) { c.Audit = func(Delivery) error { return errors.New("disk is full") } }, x509svid, codes.Unavailable},
		{"no audience", nil, entitled("entry/a"), nil, jwt(""), codes.InvalidArgument},
		{"empty audience", nil, entitled("entry/a"), nil, jwt("", "x", ""), codes.InvalidArgument},
		{"too many audiences", nil, entitled("entry/a"), nil, jwt("", strings.Split(strings.Repeat("x,", 20)+"x", ",")...), codes.InvalidArgument},
		{"malformed identity", nil, entitled("entry/a"), nil, jwt("http://x", "x"), codes.InvalidArgument},
		{"JWT for another's identity", nil, entitled("entry/a"), nil, jwt("spiffe://example.org/b", "x"), codes.PermissionDenied},
		{"issuer down", nil, entitled("entry/a"), nil, jwt("", "down"), codes.Unavailable},
		{"no JWT minter", nil, entitled("entry/a"), func(c *WorkloadConfig) { c.JWT = nil }, jwt("", "x"), codes.Unimplemented},
		{"WIT-SVID", nil, entitled("entry/a"), nil, wit, codes.Unimplemented},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, c.a, c.conf, id("/a"), id("/b"))
			ctx := header(t)
			if c.ctx != nil {
				ctx = c.ctx()
			}
			if err := c.call(ctx, s.dial(t)); status.Code(err) != c.want {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestFetchJWT(t *testing.T) {
	var mu sync.Mutex
	var said []Delivery
	s := serve(t, entitled("entry/a", "entry/b"), func(c *WorkloadConfig) {
		c.Audit = func(d Delivery) error { mu.Lock(); said = append(said, d); mu.Unlock(); return nil }
	}, id("/a"), id("/b"), id("/c"))
	c := s.dial(t)
	r, err := c.FetchJWTSVID(header(t), &workload.JWTSVIDRequest{Audience: []string{"x", "y"}})
	if err != nil || len(r.Svids) != 2 || r.Svids[0].Svid != "token of entry/a for x+y" {
		t.Errorf("all: %v, %v", r, err)
	}
	r, err = c.FetchJWTSVID(header(t), &workload.JWTSVIDRequest{Audience: []string{"x"}, SpiffeId: "spiffe://example.org/b"})
	if err != nil || len(r.Svids) != 1 || r.Svids[0].SpiffeId != "spiffe://example.org/b" {
		t.Errorf("one: %v, %v", r, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(said) != 2 || said[0].Method != "FetchJWTSVID" || len(said[0].IDs) != 2 || len(said[1].IDs) != 1 || said[0].Process.PID != os.Getpid() {
		t.Errorf("audit: %+v", said)
	}
}

func TestValidateJWTSVID(t *testing.T) {
	s := serve(t, entitled("entry/a"), nil, id("/a"))
	k := newKey(t)
	st := *s.src.Current()
	st.JWTKeys = map[string]crypto.PublicKey{"k1": k.Public()}
	if err := s.src.Set(&st); err != nil {
		t.Fatal(err)
	}
	token := signJWT(t, "ES256", k, `{"alg":"ES256","kid":"k1"}`, fmt.Sprintf(`{"sub":"spiffe://example.org/b","aud":"x","exp":%d,"n":{"m":[1]}}`, time.Now().Add(time.Minute).Unix()))
	c := s.dial(t)
	r, err := c.ValidateJWTSVID(header(t), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: token})
	if err != nil || r.SpiffeId != "spiffe://example.org/b" || r.Claims.Fields["sub"].GetStringValue() != r.SpiffeId {
		t.Errorf("got %v, %v", r, err)
	}
	for _, bad := range []*workload.ValidateJWTSVIDRequest{{Audience: "y", Svid: token}, {Svid: token}, {Audience: "x"}, {Audience: "x", Svid: "x.y.z"}} {
		if _, err := c.ValidateJWTSVID(header(t), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestJWTBundleHoldsOnlyTheKeys(t *testing.T) {
	s := serve(t, entitled("entry/a"), nil, id("/a"))
	st := *s.src.Current()
	st.JWTKeys = map[string]crypto.PublicKey{"k1": newKey(t).Public()}
	if err := s.src.Set(&st); err != nil {
		t.Fatal(err)
	}
	stream, err := s.dial(t).FetchJWTBundles(header(t), &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	b, err := jwtbundle.Parse(td, r.Bundles["spiffe://example.org"])
	if err != nil || len(b.JWTAuthorities()) != 1 {
		t.Errorf("bundle %s: %v", r.Bundles["spiffe://example.org"], err)
	}
}

func TestCaps(t *testing.T) {
	s := serve(t, entitled("entry/a"), func(c *WorkloadConfig) { c.MaxConns, c.MaxStreams, c.MaxTotal = 2, 3, 100 }, id("/a"))
	one, two := s.dial(t), s.dial(t)
	ctx, cancel := context.WithCancel(header(t))
	defer cancel()
	for _, c := range []workload.SpiffeWorkloadAPIClient{one, one, two} {
		st, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	st, err := two.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err == nil {
		_, err = st.Recv()
	}
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a fourth call: %v", err)
	}
	c, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); len(b) > 0 {
		t.Errorf("a third connection got %d bytes, %v", len(b), err)
	}
}

func TestOneUserDoesNotLockOutTheOthers(t *testing.T) {
	w, err := NewWorkloadAPI(WorkloadConfig{Source: NewSource(), Attest: entitled(), Log: slog.New(slog.DiscardHandler), MaxConns: 2, MaxTotal: 8})
	if err != nil {
		t.Fatal(err)
	}
	for pid := 1; pid <= 4; pid++ {
		if err := w.enter(pid, 1000); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.enter(5, 1000); err == nil {
		t.Error("one user holds more than a half of all connections")
	}
	if err := w.enter(6, 1001); err != nil {
		t.Errorf("another user: %v", err)
	}
	w.leave(1, 1000)
	if err := w.enter(5, 1000); err != nil {
		t.Errorf("after one has left: %v", err)
	}
	for _, c := range []struct {
		pid int
		uid uint32
	}{{2, 1000}, {3, 1000}, {4, 1000}, {5, 1000}, {6, 1001}} {
		w.leave(c.pid, c.uid)
	}
	if w.total != 0 || len(w.users) != 0 || len(w.conns) != 0 {
		t.Errorf("all have left, and %d, %v, %v are counted", w.total, w.users, w.conns)
	}
}

func TestOtherListenersAreRefused(t *testing.T) {
	w, err := NewWorkloadAPI(WorkloadConfig{Source: NewSource(), Attest: entitled(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	defer b.Close()
	if _, _, err := (&localPeers{w}).ServerHandshake(a); err == nil {
		t.Error("a connection without a process was admitted")
	}
}
