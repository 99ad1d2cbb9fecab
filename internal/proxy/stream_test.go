package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/proxyproto"
	"sallyport/internal/svid"
)

const (
	streamYAML = `services:
  - name: billing
    identity: spiffe://demo.sallyport/ns/shop/sa/billing
    port: 8443
    protocol: tcp
`
	streamCSV = `p, db, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, CONNECT, -, -, allow
`
)

// streamRig is a rig whose service speaks TCP; more is added to how it is
// carried. The address is that of the service's port beside web.
func streamRig(t *testing.T, app, more string, change ...func(*rig)) (r *rig, addr string) {
	t.Helper()
	r = newRig(t, app, append([]func(*rig){func(r *rig) { r.served, r.access = streamYAML+more, streamCSV }}, change...)...)
	addr, _ = start(t, func(ctx context.Context, ln net.Listener) error { return r.outbound.RunFor(ctx, ln, "billing") })
	return r, addr
}

// greeter speaks first, and then says what it hears.
func greeter(t *testing.T) string {
	return rawApp(t, func(c net.Conn, r *bufio.Reader) {
		_, _ = io.WriteString(c, "220 ready\r\n")
		_, _ = io.Copy(c, r)
		_ = c.(*net.TCPConn).CloseWrite()
	})
}

func (w *wire) greeted() {
	w.t.Helper()
	if line, err := w.r.ReadString('\n'); err != nil || line != "220 ready\r\n" {
		w.t.Fatalf("the server said %q, %v", line, err)
	}
}

func TestAStreamCarriesWhatIsSaid(t *testing.T) {
	r, addr := streamRig(t, greeter(t), "")
	w := newWire(t, addr, nil)
	w.greeted()
	big := noise(2<<20, 5)
	var sent sync.WaitGroup
	sent.Go(func() {
		_, _ = w.Write(big)
		_ = w.Conn.(*net.TCPConn).CloseWrite() // and the other direction goes on
	})
	got, err := io.ReadAll(w.r)
	if err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(big), err)
	}
	sent.Wait()
	list := decisions(r.inAudit)
	if len(list) != 1 || list[0].Rule != "db" || list[0].Verb != "CONNECT" || list[0].Path != "-" || list[0].Src != web.String() {
		t.Errorf("recorded %+v", list)
	}
	w.Close()
	await(t, func() bool {
		return r.metric(`sallyport_requests_total{code="200",dst="ns/shop/sa/billing",flag="",grpc="",proto="tcp",reporter="inbound",route="",src="ns/shop/sa/web",tls="mutual"}`) == "1"
	})
}

func TestAStreamByCONNECT(t *testing.T) {
	r, _ := streamRig(t, greeter(t), "")
	w := r.dial()
	w.say("CONNECT billing.mesh.internal:5432 HTTP/1.1\r\nHost: billing.mesh.internal:5432\r\n\r\n")
	line, _ := w.r.ReadString('\n')
	if blank, _ := w.r.ReadString('\n'); !strings.HasPrefix(line, "HTTP/1.1 200 ") || blank != "\r\n" {
		t.Fatalf("got %q %q", line, blank)
	}
	w.greeted()
	w.echo()
	resp, body := get(t, r.client(), "http://billing.mesh.internal/ok/1")
	if resp.StatusCode != 421 || !strings.Contains(body, "speaks tcp") {
		t.Errorf("HTTP to a service that speaks tcp: %d %s", resp.StatusCode, body)
	}
}

// tried is a connection that may be reset at once, nil when it was already.
func tried(t *testing.T, addr string) *wire {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return wireOn(t, c, nil)
}

// TestAStreamIsRefused holds that the application hears nothing of what the
// policy does not allow, and that the caller sees a reset.
func TestAStreamIsRefused(t *testing.T) {
	heard := make(chan string, 16)
	app := rawApp(t, func(c net.Conn, r *bufio.Reader) {
		line, _ := r.ReadString('\n')
		heard <- line
	})
	refused := func(t *testing.T, w *wire) {
		t.Helper()
		if w == nil {
			return // before connect had returned
		}
		_, _ = io.WriteString(w, "GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")
		if b, err := io.ReadAll(w.r); len(b) > 0 {
			t.Errorf("got %q, %v", b, err)
		}
		select {
		case line := <-heard:
			t.Errorf("the application heard %q", line)
		default:
		}
	}
	t.Run("no row", func(t *testing.T) {
		r, addr := streamRig(t, app, "", func(r *rig) { r.access = accessCSV[:0] })
		refused(t, tried(t, addr))
		if list := decisions(r.inAudit); len(list) != 1 || list[0].Decision != audit.Deny || list[0].ID == "" {
			t.Errorf("recorded %+v", list)
		}
	})
	t.Run("a service that is gone", func(t *testing.T) {
		r, addr := streamRig(t, greeter(t), "")
		newWire(t, addr, nil).greeted()
		r.served = strings.Replace(streamYAML, "billing", "other", 1)
		r.use("")
		refused(t, tried(t, addr))
		if list := decisions(r.outAudit); len(list) != 1 || list[0].Reason != "no_route" {
			t.Errorf("recorded %+v", list)
		}
	})
	t.Run("a row of HTTP", func(t *testing.T) {
		r, addr := streamRig(t, app, "")
		r.use("p, all, in, **, spiffe://demo.sallyport/ns/shop/*/*, *, GET, **, -, allow\n")
		refused(t, tried(t, addr))
	})
	t.Run("a peer that means HTTP", func(t *testing.T) {
		r, _ := streamRig(t, app, "")
		refused(t, r.dialIn(r.web))
		if list := decisions(r.inAudit); len(list) != 1 || list[0].Reason != "protocol" {
			t.Errorf("recorded %+v", list)
		}
	})
	t.Run("another program", func(t *testing.T) {
		r, addr := streamRig(t, app, "")
		stranger := errors.New("pid 1 is not the workload")
		r.stranger.Store(&stranger)
		refused(t, tried(t, addr))
		if list := decisions(r.outAudit); len(list) != 1 || list[0].Reason != "not_workload" {
			t.Errorf("recorded %+v", list)
		}
	})
	t.Run("a log that cannot be written", func(t *testing.T) {
		r, addr := streamRig(t, app, "")
		r.inAudit.Close()
		refused(t, tried(t, addr))
	})
	t.Run("no proof", func(t *testing.T) {
		r, _ := streamRig(t, app, "")
		x := &call{conn: &conn{}, port: 8443}
		if f := r.inbound.carryTo(x, authz.Grant{}); f == nil || f.reason != "no_grant" {
			t.Errorf("carried without a Grant: %+v", f)
		}
	})
}

func TestAStreamEnds(t *testing.T) {
	t.Run("when the policy takes it back", func(t *testing.T) {
		r, addr := streamRig(t, greeter(t), "")
		w := newWire(t, addr, nil)
		w.greeted()
		r.use("")
		r.inbound.Rejudge()
		severed(t, w, "a stream that is not allowed any more")
		if list := closedFor(r.inAudit, reasonPolicy); len(list) != 1 {
			t.Errorf("recorded %+v", list)
		}
	})
	t.Run("when the service speaks HTTP", func(t *testing.T) {
		r, addr := streamRig(t, greeter(t), "")
		w := newWire(t, addr, nil)
		w.greeted()
		r.served = servicesYAML
		r.use("p, all, in, **, **, *, *, **, -, allow\n")
		r.inbound.Rejudge()
		severed(t, w, "a stream of a service that speaks HTTP")
	})
	t.Run("when the caller is revoked", func(t *testing.T) {
		r, addr := streamRig(t, greeter(t), "")
		w := newWire(t, addr, nil)
		w.greeted()
		r.billing.Revoke(revocationOf(r.web))
		r.inbound.Rejudge()
		severed(t, w, "a stream of a caller that is revoked")
	})
	t.Run("when nothing moves", func(t *testing.T) {
		_, addr := streamRig(t, greeter(t), "    stream: {idle_timeout: 1s}\n")
		w := newWire(t, addr, nil)
		w.greeted()
		if _, err := io.ReadAll(w.r); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
	})
	t.Run("when its life is over", func(t *testing.T) {
		_, addr := streamRig(t, greeter(t), "    stream: {max_life: 1s}\n")
		w := newWire(t, addr, nil)
		w.greeted()
		for {
			if _, err := io.WriteString(w, "still here\n"); err != nil {
				return // it moved until the end
			}
			if _, err := w.r.ReadString('\n'); err != nil {
				return
			}
		}
	})
}

// TestTheApplicationLearnsWhoCalls reads the header that it gets, of a caller
// behind a load balancer that tells its address.
func TestTheApplicationLearnsWhoCalls(t *testing.T) {
	got := make(chan proxyproto.Header, 1)
	app := rawApp(t, func(c net.Conn, r *bufio.Reader) {
		h, err := proxyproto.Read(r)
		if err != nil {
			t.Error(err)
		}
		got <- h
		_, _ = io.Copy(c, r)
	})
	from := func(prefix string) func(*rig) {
		return func(r *rig) { r.inCfg.ProxyFrom = []netip.Prefix{netip.MustParsePrefix(prefix)} }
	}
	balancer := func(t *testing.T, r *rig, head []byte) *wire {
		t.Helper()
		c, err := net.Dial("tcp", r.inAddr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(head); err != nil {
			t.Fatal(err)
		}
		return wireOn(t, c, svid.ClientTLS(r.web, billing))
	}
	client := netip.MustParseAddrPort("192.0.2.7:4711")
	head := proxyproto.Header{Src: client, Dst: netip.MustParseAddrPort("192.0.2.1:443"), SPIFFE: "spiffe://evil.test/admin"}.Append(nil)
	const v2 = "    stream: {proxy_protocol: v2}\n"
	t.Run("behind a load balancer", func(t *testing.T) {
		r, _ := streamRig(t, app, v2, from("127.0.0.0/8"))
		w := balancer(t, r, head)
		w.echo()
		if h := <-got; h.Src != client || h.SPIFFE != web.String() {
			t.Errorf("the application was told %+v", h)
		}
		if list := decisions(r.inAudit); len(list) != 1 || list[0].Peer != client.String() || list[0].Src != web.String() {
			t.Errorf("recorded %+v", list)
		}
	})
	t.Run("a load balancer that says nothing", func(t *testing.T) {
		r, addr := streamRig(t, app, v2, from("127.0.0.0/8"))
		if w := tried(t, addr); w != nil {
			if b, _ := io.ReadAll(w.r); len(b) > 0 {
				t.Errorf("got %q", b)
			}
		}
		awaitRecords(t, r.inAudit, audit.KindTLS, 1)
	})
	t.Run("anybody else", func(t *testing.T) {
		r, _ := streamRig(t, app, v2, from("198.51.100.0/24"))
		c, err := net.Dial("tcp", r.inAddr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = c.Write(head)
		if b, _ := io.ReadAll(c); bytes.Contains(b, []byte("220")) {
			t.Errorf("a header of a stranger was taken: %q", b)
		}
		awaitRecords(t, r.inAudit, audit.KindTLS, 1)
	})
}

func TestStreamChains(t *testing.T) {
	r, _ := streamRig(t, greeter(t), "")
	var names []string
	for _, l := range append(r.inbound.streamChain(), newDoor(r.outbound, "billing").streamChain()...) {
		names = append(names, l.name)
	}
	const want = "access record, trace, signals, in-flight limit, protocol, rate limit, judge, application, " +
		"access record, trace, signals, workload, in-flight limit, route, shadow's hands, upstream"
	if got := strings.Join(names, ", "); got != want {
		t.Errorf("the links are %s\nwant %s", got, want)
	}
}
