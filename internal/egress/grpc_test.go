package egress

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	meta "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"sallyport/internal/audit"
	own "sallyport/internal/http2"
	"sallyport/internal/mux"
)

// rpcs lets billing call two methods of a service outside.
const rpcs = access + `
p, rpc-unary, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, 443, POST, /grpc.testing.TestService/UnaryCall, env.sni=same, allow
p, rpc-both, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, 443, POST, /grpc.testing.TestService/FullDuplexCall, env.sni=same, allow
p, rpc-out, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:shop.test, 443, POST, /grpc.testing.TestService/StreamingOutputCall, env.sni=same, allow
`

// An rpcHost is a host outside whose server of gRPC knows nothing but that.
type rpcHost struct {
	grpc_testing.UnimplementedTestServiceServer
	seen chan meta.MD
	over chan error // how calls both ways ended
}

func startRPC(t *testing.T) (*rpcHost, *site) {
	t.Helper()
	s := startSite(t, "shop.test")
	h := &rpcHost{seen: make(chan meta.MD, 16), over: make(chan error, 16)}
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: s.certs})))
	grpc_testing.RegisterTestServiceServer(srv, h)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(srv.Stop)
	return h, s
}

// EmptyCall is what no row allows.
func (h *rpcHost) EmptyCall(context.Context, *grpc_testing.Empty) (*grpc_testing.Empty, error) {
	h.seen <- nil
	return &grpc_testing.Empty{}, nil
}

// UnaryCall answers with what it was sent, with the status that it is asked for, or,
// asked for a user name, not at all.
func (h *rpcHost) UnaryCall(ctx context.Context, r *grpc_testing.SimpleRequest) (*grpc_testing.SimpleResponse, error) {
	md, _ := meta.FromIncomingContext(ctx)
	h.seen <- md
	if r.GetFillUsername() { // never
		<-ctx.Done()
		h.over <- ctx.Err()
		return nil, ctx.Err()
	}
	_ = grpc.SetTrailer(ctx, meta.Pairs("late", "said:"+strings.Join(md["authorization"], ",")))
	if s := r.GetResponseStatus(); s != nil {
		return nil, status.Error(codes.Code(s.GetCode()), s.GetMessage()) //nolint:gosec // of a test
	}
	return &grpc_testing.SimpleResponse{Payload: r.GetPayload(), Username: strings.Join(md["authorization"], ",")}, nil
}

// FullDuplexCall answers each message before the next one comes.
func (h *rpcHost) FullDuplexCall(s grpc.BidiStreamingServer[grpc_testing.StreamingOutputCallRequest, grpc_testing.StreamingOutputCallResponse]) (err error) {
	defer func() { h.over <- err }()
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			s.SetTrailer(meta.Pairs("late", "all"))
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&grpc_testing.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
			return err
		}
	}
}

// StreamingOutputCall sends as many messages as it is asked for.
func (h *rpcHost) StreamingOutputCall(r *grpc_testing.StreamingOutputCallRequest, s grpc.ServerStreamingServer[grpc_testing.StreamingOutputCallResponse]) error {
	for _, p := range r.GetResponseParameters() {
		if err := s.Send(&grpc_testing.StreamingOutputCallResponse{Payload: &grpc_testing.Payload{Body: make([]byte, p.GetSize())}}); err != nil {
			return err
		}
	}
	return nil
}

// A dialledConn is a tunnel as clients of gRPC want one.
type dialledConn struct{ netConn }

// Read has a tunnel that is reset end: a StreamError is one of a call to grpc, which
// reads on after it for ever.
func (c dialledConn) Read(p []byte) (int, error) {
	n, err := c.netConn.Read(p)
	if _, reset := err.(http2.StreamError); reset {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (dialledConn) LocalAddr() net.Addr  { return &net.TCPAddr{} }
func (dialledConn) RemoteAddr() net.Addr { return &net.TCPAddr{} }

// rpcClient speaks HTTP/2 in the clear in tunnels to a host.
func rpcClient(t *testing.T, w *world, dial dialFunc, authority string) grpc_testing.TestServiceClient {
	t.Helper()
	return rpcClientBy(t, w, dial, authority, insecure.NewCredentials())
}

func rpcClientBy(t *testing.T, w *world, dial dialFunc, authority string, creds credentials.TransportCredentials) grpc_testing.TestServiceClient {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+authority, grpc.WithTransportCredentials(creds),
		// Who has failed must not dial again by itself, beside the test or after it.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Hour, MaxDelay: time.Hour}}),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			tun, ref := dial(w, billing, authority)
			if ref != nil {
				return nil, errors.New("no tunnel")
			}
			return dialledConn{netConn{t: tun}}, nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return grpc_testing.NewTestServiceClient(c)
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func payload(n int) *grpc_testing.Payload {
	return &grpc_testing.Payload{Body: []byte(strings.Repeat("x", n))}
}

// TestCallsOfGRPC has an application that speaks HTTP/2 in the clear call methods of
// a host, each of which is judged.
func TestCallsOfGRPC(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		h, s := startRPC(t)
		w := newWorld(t, nil)
		w.use(w.policy(rpcs, s.originated("shop.test")+"    alpn: [h2, http/1.1]\n"))
		calls(t, w, h, rpcClient(t, w, dial, "shop.test:80"))
	})
}

// TestInspectedCallsOfGRPC has it insist on TLS.
func TestInspectedCallsOfGRPC(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		h, s := startRPC(t)
		w, roots := inspectorWorld(t)
		host := s.inspected("shop.test")
		w.inspect(rpcs, host+"    alpn: [h2]\n", roots)
		creds := credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "shop.test"})
		calls(t, w, h, rpcClientBy(t, w, dial, "shop.test:443", creds))
		other := rpcClientBy(t, w, dial, "shop.test:443", credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "evil.test"}))
		if _, err := other.UnaryCall(soon(t), &grpc_testing.SimpleRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("by another name: %v", err)
		}
		w.until("the refusal of the name", denial(ReasonSNI))
		w.inspect(rpcs, host, roots)
		if _, err := rpcClientBy(t, w, dial, "shop.test:443", creds).UnaryCall(soon(t), &grpc_testing.SimpleRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("without alpn: %v", err)
		}
		w.until("the refusal of what the gateway may not speak", func(r audit.Record) bool {
			return r.Reason == string(ReasonALPN) && strings.Contains(r.Detail, `offers "h2"; in the place of this host the gateway speaks http/1.1`)
		})
	})
}

// calls has each kind of call made, and one that no row allows.
func calls(t *testing.T, w *world, h *rpcHost, c grpc_testing.TestServiceClient) {
	t.Helper()
	for _, size := range []int{0, 100, 300_000} {
		var late meta.MD
		res, err := c.UnaryCall(soon(t), &grpc_testing.SimpleRequest{Payload: payload(size)}, grpc.Trailer(&late))
		if err != nil || len(res.GetPayload().GetBody()) != size || strings.Join(late["late"], "") != "said:" {
			t.Fatalf("%d bytes: %d came back, trailers %v: %v", size, len(res.GetPayload().GetBody()), late, err)
		}
	}
	rec := w.until("the record of a call", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Rule == "rpc-unary" })
	if rec.Path != "/grpc.testing.TestService/UnaryCall" || rec.Verb != "POST" || rec.Port != 443 {
		t.Errorf("recorded %+v", rec)
	}
	_, err := c.UnaryCall(soon(t), &grpc_testing.SimpleRequest{ResponseStatus: &grpc_testing.EchoStatus{Code: int32(codes.DataLoss), Message: "50% lost"}})
	if st := status.Convert(err); st.Code() != codes.DataLoss || st.Message() != "50% lost" {
		t.Errorf("the status of the host came as %v", err)
	}
	for len(h.seen) > 0 {
		<-h.seen
	}
	_, err = c.EmptyCall(soon(t), &grpc_testing.Empty{})
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || !strings.Contains(st.Message(), "denied by policy") || len(h.seen) > 0 {
		t.Errorf("what no row allows: %v, %d calls got there", err, len(h.seen))
	}
	w.until("the denial", func(r audit.Record) bool {
		return r.Decision == audit.Deny && r.Path == "/grpc.testing.TestService/EmptyCall"
	})
	bothWays(t, h, c)
	out, err := c.StreamingOutputCall(soon(t), &grpc_testing.StreamingOutputCallRequest{
		ResponseParameters: []*grpc_testing.ResponseParameters{{Size: 200_000}, {Size: 1}, {Size: 500_000}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{200_000, 1, 500_000} {
		if m, err := out.Recv(); err != nil || len(m.GetPayload().GetBody()) != size {
			t.Fatalf("%d bytes of %d: %v", len(m.GetPayload().GetBody()), size, err)
		}
	}
	if _, err := out.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the stream ended with %v", err)
	}
}

// bothWays has messages go to and fro in one call, and breaks another one off.
func bothWays(t *testing.T, h *rpcHost, c grpc_testing.TestServiceClient) {
	t.Helper()
	s, err := c.FullDuplexCall(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 70_000, 3} {
		if err := s.Send(&grpc_testing.StreamingOutputCallRequest{Payload: payload(size)}); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Recv(); err != nil || len(m.GetPayload().GetBody()) != size {
			t.Fatalf("%d bytes of %d came back: %v", len(m.GetPayload().GetBody()), size, err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) || strings.Join(s.Trailer()["late"], "") != "all" {
		t.Errorf("the call ended with %v, trailers %v", err, s.Trailer())
	}
	if err := <-h.over; err != nil {
		t.Errorf("to the host the call ended with %v", err)
	}
	ctx, cancel := context.WithCancel(soon(t))
	if s, err = c.FullDuplexCall(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&grpc_testing.StreamingOutputCallRequest{Payload: payload(9)}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-h.over; status.Code(err) != codes.Canceled {
		t.Errorf("to the host the call that was broken off ended with %v", err)
	}
	ctx, cancel = context.WithCancel(soon(t))
	answered := make(chan error, 1)
	go func() {
		_, err := c.UnaryCall(ctx, &grpc_testing.SimpleRequest{FillUsername: true})
		answered <- err
	}()
	<-h.seen
	cancel()
	if err := <-answered; status.Code(err) != codes.Canceled {
		t.Errorf("the call without an answer ended with %v", err)
	}
	if err := <-h.over; !errors.Is(err, context.Canceled) {
		t.Errorf("to the host it ended with %v", err)
	}
}

// TestCallsEndWithTheirRow has a call that is under way lose its row.
func TestCallsEndWithTheirRow(t *testing.T) {
	h, s := startRPC(t)
	w := newWorld(t, nil)
	host := s.originated("shop.test") + "    alpn: [h2]\n"
	w.use(w.policy(rpcs, host))
	c := rpcClient(t, w, dialStream, "shop.test:80")
	call, err := c.FullDuplexCall(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := call.Send(&grpc_testing.StreamingOutputCallRequest{Payload: payload(9)}); err != nil {
		t.Fatal(err)
	}
	if _, err := call.Recv(); err != nil {
		t.Fatal(err)
	}
	w.use(w.policy(strings.ReplaceAll(rpcs, "p, rpc-both", "# "), host))
	w.gw.Rejudge()
	if _, err := call.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the call ended with %v", err)
	}
	if err := <-h.over; err == nil {
		t.Error("the host was told of an orderly end")
	}
	w.until("the end", func(r audit.Record) bool {
		return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) && r.Rule == "rpc-both"
	})
	if _, err := c.UnaryCall(soon(t), &grpc_testing.SimpleRequest{}); err != nil {
		t.Errorf("another method afterwards: %v", err)
	}
}

// TestCallsNeedHTTP2 has the gateway refuse calls to hosts that it asks over HTTP/1.1
// alone, by the destination or by their own choice.
func TestCallsNeedHTTP2(t *testing.T) {
	_, s := startRPC(t)
	w := newWorld(t, nil)
	w.use(w.policy(rpcs, s.originated("shop.test")))
	_, err := rpcClient(t, w, dialStream, "shop.test:80").UnaryCall(soon(t), &grpc_testing.SimpleRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("without alpn: %v", err)
	}
	w.until("a refusal", denial(ReasonALPN))
	old := startSite(t, "shop.test")
	old.speaks("http/1.1")
	w.use(w.policy(rpcs, old.originated("shop.test")+"    alpn: [h2, http/1.1]\n"))
	_, err = rpcClient(t, w, dialStream, "shop.test:80").UnaryCall(soon(t), &grpc_testing.SimpleRequest{})
	if status.Code(err) != codes.Unavailable || len(old.seen) > 0 {
		t.Errorf("a host that speaks HTTP/1.1: %v, %d requests got there%s", err, len(old.seen), w.lines())
	}
}

// TestCallsWithCredentials has the gateway add what the workload does not have, and
// take it out of messages and trailers.
func TestCallsWithCredentials(t *testing.T) {
	h, s := startRPC(t)
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(credential+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(c *Config) { c.Secrets = NewSecrets(map[string]SecretSource{"shop": {File: file}}) })
	w.use(w.policy(rpcs, s.originated("shop.test")+"    alpn: [h2]\n    inject: {secret: shop, header: Authorization, prefix: \"Bearer \", paths: [/grpc.testing.TestService/*]}\n"))
	var late meta.MD
	res, err := rpcClient(t, w, dialStream, "shop.test:80").UnaryCall(soon(t), &grpc_testing.SimpleRequest{}, grpc.Trailer(&late))
	if err != nil {
		t.Fatal(err)
	}
	md := <-h.seen
	stars := strings.Repeat("*", len(credential))
	if got := strings.Join(md["authorization"], ","); got != "Bearer "+credential || md["grpc-accept-encoding"] != nil {
		t.Errorf("the host saw %v", md)
	}
	if res.GetUsername() != "Bearer "+stars || strings.Join(late["late"], ",") != "said:Bearer "+stars {
		t.Errorf("the workload saw %v, trailers %v", res, late)
	}
}

// TestDrainEndsHTTP2InTunnels has a gateway that is to end let the call under way
// end, and the tunnel with it.
func TestDrainEndsHTTP2InTunnels(t *testing.T) {
	h, s := startRPC(t)
	w := newWorld(t, nil)
	w.use(w.policy(rpcs, s.originated("shop.test")+"    alpn: [h2]\n"))
	c := rpcClient(t, w, dialStream, "shop.test:80")
	call, err := c.FullDuplexCall(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := call.Send(&grpc_testing.StreamingOutputCallRequest{Payload: payload(9)}); err != nil {
		t.Fatal(err)
	}
	if _, err := call.Recv(); err != nil {
		t.Fatal(err)
	}
	w.gw.Yield(true)
	if err := call.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := call.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the call ended with %v", err)
	}
	if err := <-h.over; err != nil {
		t.Errorf("to the host the call ended with %v", err)
	}
	w.until("the end of the tunnel", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Detail == "for requests" })
}

// TestCallsThatAreBrokenOff again and again end the connection in the tunnel, and are
// held against who makes them.
func TestCallsThatAreBrokenOff(t *testing.T) {
	s := startSite(t, "shop.test")
	w := newWorldOf(t, nil, func(g *Gateway) {
		g.calmOf = mux.NewCalm[spiffeid.ID](brokenBurst, 0) // a slow flood is one, too
	})
	w.use(w.policy(asking, s.originated("shop.test")))
	got := callRaw(t, w, w.streamsOn(billing), func(r *rawSite) {
		go func() { // who speaks must not wait for who listens
			for id := uint32(1); id < 1<<24; id += 2 {
				r.head(id, true, ":method", "GET", ":scheme", "http", ":path", "/v1/a", ":authority", "shop.test")
				if r.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
					return
				}
			}
		}()
		for over := false; !over; { // some calls are answered before
			f, err := r.ReadFrame()
			_, away := f.(*http2.GoAwayFrame)
			over = away || err != nil
		}
	})
	if got != "reset" || !w.gw.calmOf.Worn(billing) {
		t.Errorf("a flood came to %s; is it held against its caller: %v", got, w.gw.calmOf.Worn(billing))
	}
	if w.gw.calmOf.Worn(inventory) {
		t.Error("it is held against another")
	}
	rec := w.until("the refusal", denial(ReasonRequest))
	if !strings.Contains(rec.Detail, "no HTTP/2: peer broke the protocol") || rec.Rule != "" {
		t.Errorf("recorded %+v", rec)
	}
}

// TestBodiesInTunnelsThatNobodyReads are broken off where there is no memory left for
// them.
func TestBodiesInTunnelsThatNobodyReads(t *testing.T) {
	came := make(chan bool, 1)
	s := startSite(t, "shop.test")
	s.addr = serve(t, func(c net.Conn) {
		came <- true
		_, _ = io.Copy(io.Discard, c) // it shakes no hands
	})
	w := newWorld(t, nil)
	w.use(w.policy(asking, s.originated("shop.test")))
	h := w.streamsOn(billing)
	defer w.gw.exhaust(billing, true)()
	got := callRaw(t, w, h, func(r *rawSite) {
		r.head(1, false, ":method", "POST", ":scheme", "http", ":path", "/v1/a", ":authority", "shop.test")
		r.data(1, false, strings.Repeat("x", 1<<10))
		<-came
		for range 3 {
			r.data(1, false, strings.Repeat("x", 15<<10))
		}
	})
	if got != "reset" {
		t.Errorf("the call came to %s", got)
	}
}

// TestNothingIsHeldOnceTheGatewayDrains has a connection in a tunnel come too late.
func TestNothingIsHeldOnceTheGatewayDrains(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	g := &Gateway{inner: map[*own.Conn]bool{}, draining: true}
	if g.holds(own.Accepted(near, own.Config{}, nil)) || len(g.inner) > 0 {
		t.Errorf("%d connections are held", len(g.inner))
	}
}
