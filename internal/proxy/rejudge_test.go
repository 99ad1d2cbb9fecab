package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

// revocationOf is a revocation of what a source shows.
func revocationOf(s *svid.Source) []mesh.RevokedSVID {
	leaf := s.Current().Identities[0].Chain[0]
	return []mesh.RevokedSVID{{Serial: mesh.SerialText(leaf.SerialNumber), Until: leaf.NotAfter, Why: mesh.WhyBanned}}
}

// closedFor are the records of connections that were closed for a reason.
func closedFor(l *audit.Log, reason string) (out []audit.Record) {
	for _, r := range l.Records() {
		if r.Kind == audit.KindTLS && r.Reason == reason {
			out = append(out, r)
		}
	}
	return out
}

// severed waits until the other end breaks the connection off.
func severed(t *testing.T, w *wire, what string) {
	t.Helper()
	if b, err := w.r.ReadByte(); err == nil {
		t.Errorf("%s: got %q, want that it is closed", what, b)
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Errorf("%s: it is still open", what)
	}
}

const slowRequest = "GET /ok/slow HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n"

const wsRequest = "GET /ok/ws HTTP/1.1\r\nHost: billing.mesh.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

// echoApp upgrades and then gives back what it gets; a call that ends in slow
// is answered in part and then waits.
func echoApp(t *testing.T) string {
	return rawApp(t, func(c net.Conn, br *bufioReader) {
		for {
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			switch {
			case req.Header.Get("Upgrade") != "":
				fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				_, _ = io.Copy(c, br)
				return
			case strings.HasSuffix(req.RequestURI, "slow"):
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
			default:
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
		}
	})
}

// upgraded makes of w an open upgraded connection.
func (w *wire) upgraded(request string) {
	w.t.Helper()
	w.say(request)
	resp, err := http.ReadResponse(w.r, &http.Request{Method: "GET"})
	if err != nil || resp.StatusCode != 101 {
		w.t.Fatalf("got %v, %v", resp, err)
	}
	w.echo()
}

func (w *wire) echo() {
	w.t.Helper()
	w.say("ping")
	got := make([]byte, 4)
	if _, err := io.ReadFull(w.r, got); err != nil || string(got) != "ping" {
		w.t.Fatalf("got %q, %v", got, err)
	}
}

// streams asks for an answer that does not end and reads its beginning.
func (w *wire) streams(request string) {
	w.t.Helper()
	w.say(request)
	if resp, err := http.ReadResponse(w.r, nil); err != nil || resp.StatusCode != 200 {
		w.t.Fatal(resp, err)
	}
	if _, err := io.ReadFull(w.r, make([]byte, 4)); err != nil {
		w.t.Fatal(err)
	}
}

func TestARevokedCallerIsCutOffWhateverItDoes(t *testing.T) {
	r := newRig(t, echoApp(t))
	thief := meshtest.Source(t, r.ca, web)
	idle, slow, ws, bare := r.dialIn(thief), r.dialIn(thief), r.dialIn(thief), r.dialIn(thief)
	idle.say(okRequest)
	idle.answer("GET")
	slow.streams(slowRequest)
	ws.upgraded(wsRequest)
	honest := r.dialIn(r.web) // the same identity by another SVID
	honest.upgraded(wsRequest)
	await(t, func() bool { return known(r.inbound) == 5 })
	r.billing.Revoke(revocationOf(thief))
	r.inbound.Rejudge()
	for name, w := range map[string]*wire{"idle": idle, "a call in flight": slow, "upgraded": ws, "without a call yet": bare} {
		severed(t, w, name)
	}
	honest.echo()
	if got := closedFor(r.inAudit, "svid_revoked"); len(got) != 4 || got[0].Src != web.String() || got[0].Dst != billing.String() {
		t.Errorf("recorded %+v", got)
	}
	c, err := net.Dial("tcp", r.inAddr)
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{t: t, Conn: c}
	defer c.Close()
	if w.refusedHandshake(thief) == nil {
		t.Error("a new handshake by a revoked SVID was taken")
	}
}

// known counts the connections whose peer has proved an identity.
func known(in *Inbound) (n int) {
	for _, c := range in.conns() {
		if c.look().who != nil {
			n++
		}
	}
	return n
}

// refusedHandshake says why a peer does not get in.
func (w *wire) refusedHandshake(s *svid.Source) error {
	_ = w.SetDeadline(time.Now().Add(patience))
	tc := tls.Client(w.Conn, svid.ClientTLS(s, billing, "http/1.1"))
	if err := tc.Handshake(); err != nil {
		return err
	}
	_, err := tc.Read(make([]byte, 1)) // TLS 1.3: the refusal comes afterwards
	return err
}

func TestAHandshakeBesideARevocationIsSeen(t *testing.T) {
	r := newRig(t, echoApp(t))
	// The revocation comes while the handshake is being made: it has passed
	// the check, and no Rejudge knows of it yet.
	thief := meshtest.Source(t, r.ca, web)
	x := &call{conn: &conn{}, epoch: r.inbound.epoch.Load()}
	w := r.dialIn(thief)
	await(t, func() bool { return known(r.inbound) == 1 })
	x.conn.proved(r.inbound.conns()[0].look().who)
	r.billing.Revoke(revocationOf(thief))
	if reason, _ := r.inbound.stands(x); reason != "" {
		t.Errorf("without a Rejudge nobody looks, got %s", reason)
	}
	r.inbound.Rejudge()
	if reason, _ := r.inbound.stands(x); reason != reasonRevoked {
		t.Errorf("after it got %q", reason)
	}
	severed(t, w, "the connection")
}

func TestPolicyEndsAnUpgradedConnection(t *testing.T) {
	r := newRig(t, echoApp(t))
	w := r.dialIn(r.web)
	w.upgraded(wsRequest)
	r.inbound.Rejudge()
	w.echo()
	r.use("")
	r.inbound.Rejudge()
	severed(t, w, "an upgraded connection that is not allowed any more")
	if got := closedFor(r.inAudit, "revoked"); len(got) != 1 {
		t.Errorf("recorded %+v", got)
	}
}

// What an edit takes away ends whatever it is in the middle of; what it leaves
// goes on.
func TestPolicyEndsWhatItDoesNotAllowAnyMore(t *testing.T) {
	r := newRig(t, echoApp(t))
	idle, slow, ws, refused := r.dialIn(r.web), r.dialIn(r.web), r.dialIn(r.web), r.dialIn(r.web)
	idle.say(okRequest)
	idle.answer("GET")
	slow.streams(slowRequest)
	ws.upgraded(wsRequest)
	nothing := strings.Replace(okRequest, "/ok/1", "/secret", 1)
	refused.say(nothing)
	refused.answer("GET")
	row := func(path string) string {
		return "p, all, in, " + web.String() + ", " + billing.String() + ", 8443, *, " + path + ", -, allow\n"
	}

	r.use(row("/ok/ws") + row2(row("/ok/1")))
	r.inbound.Rejudge()
	severed(t, slow, "a call in flight that is not allowed any more")
	ws.echo()
	idle.say(okRequest)
	if resp, _ := idle.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("the connection of a peer that has lost some of its rights got %s", resp.Status)
	}
	await(t, func() bool { return carrying(r.inbound) == 1 }) // ws alone: the answer came before the end of its call

	r.use(row("/elsewhere"))
	r.inbound.Rejudge()
	severed(t, ws, "an upgraded connection that is not allowed any more")
	idle.say(nothing) // it may call something, so that it is told
	if resp, _ := idle.answer("GET"); resp.StatusCode != 403 {
		t.Errorf("got %s", resp.Status)
	}

	r.use("")
	r.inbound.Rejudge()
	severed(t, idle, "a connection of a peer that may call nothing any more")
	r.inbound.Rejudge()
	refused.say(nothing) // it had nothing to lose
	if resp, _ := refused.answer("GET"); resp.StatusCode != 403 {
		t.Errorf("got %s", resp.Status)
	}
	// idle may have been ended by the look that comes after, for its answer came
	// before the end of its call; that one records by itself.
	await(t, func() bool { return len(closedFor(r.inAudit, "revoked")) == 3 })
}

// carrying counts the connections that carry a call that was allowed.
func carrying(in *Inbound) (n int) {
	for _, c := range in.conns() {
		if c.look().carries {
			n++
		}
	}
	return n
}

// row2 is a row under another name.
func row2(row string) string { return strings.Replace(row, "p, all,", "p, all-2,", 1) }

// A call that was judged by the policy before is not forwarded by the one after,
// although no Rejudge has seen it.
func TestACallThatAnEditOvertakes(t *testing.T) {
	r := newParts(t, echoApp(t))
	forward := &r.inbound.chain[len(r.inbound.chain)-1]
	take := forward.enter
	forward.enter = func(x *call) *refusal {
		r.use("") // after the judge
		r.inbound.Rejudge()
		return take(x)
	}
	r.inAddr, _ = start(t, r.inbound.Run)
	r.use(r.access)
	w := r.dialIn(r.web)
	w.say(okRequest)
	resp, body := w.answer("GET")
	denied(t, resp, body, r.inAudit, reasonPolicy)
}

func TestARevokedServiceIsLeft(t *testing.T) {
	r := newRig(t, echoApp(t))
	idle, ws := r.dial(), r.dial()
	idle.say(proxied)
	idle.answer("GET")
	ws.upgraded(strings.Replace(wsRequest, "/ok/ws", "http://billing.mesh.internal/ok/ws", 1))
	idle.say(proxied) // the connection that the upgrade took is not the idle one
	idle.answer("GET")
	r.web.Revoke(revocationOf(r.billing))
	r.outbound.Rejudge()
	severed(t, ws, "an upgraded connection")
	// The connection of the call may be on its way back to the idle ones, where
	// it is closed without a record: nothing was carried on it.
	if got := closedFor(r.outAudit, "svid_revoked"); len(got) < 1 || got[0].Src != web.String() || got[0].Dst != billing.String() || got[0].Peer != r.inAddr {
		t.Errorf("recorded %+v, want the upgraded connection and perhaps the idle one", got)
	}
	await(t, func() bool { return known(r.inbound) == 0 }) // both ends are closed
	again := r.dial()
	again.say(proxied)
	if resp, body := again.answer("GET"); resp.StatusCode != 503 {
		t.Errorf("a call to a revoked service got %d %s", resp.StatusCode, body)
	}
}

func TestARevokedGatewayIsLeft(t *testing.T) {
	r := newRig(t, "127.0.0.1:1")
	gw := fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, _ *http.Request) {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		_, _ = io.Copy(c, br)
	})
	w := r.dial()
	w.say(connectStripe + "\r\n")
	if resp, err := http.ReadResponse(w.r, &http.Request{Method: "CONNECT"}); err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	w.echo()
	r.web.Revoke(revocationOf(gw))
	r.outbound.Rejudge()
	severed(t, w, "a tunnel")
	if got := closedFor(r.outAudit, "svid_revoked"); len(got) != 1 || got[0].Dst != gateway.String() {
		t.Errorf("recorded %+v", got)
	}
}

func TestAnUpgradedConnectionOutlivesTheSVIDOfItsPeer(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"caller", "service"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			r := newRig(t, echoApp(t))
			short, id := r.web, web
			if end == "service" {
				short, id = r.billing, billing
			}
			st := *short.Current()
			st.Identities = []svid.Identity{r.ca.Issue(t, id, 15*time.Second)}
			if err := short.Set(&st); err != nil {
				t.Fatal(err)
			}
			w := r.dial()
			w.upgraded(strings.Replace(wsRequest, "/ok/ws", "http://billing.mesh.internal/ok/ws", 1))
			<-time.After(time.Until(st.Identities[0].Chain[0].NotAfter.Add(100 * time.Millisecond)))
			r.inbound.Rejudge()
			r.outbound.Rejudge()
			w.echo()
		})
	}
}

func TestEveryLooksUntilItsContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	every(ctx, time.Millisecond, func() {
		if n++; n == 3 {
			cancel()
		}
	})
	if n < 3 {
		t.Errorf("looked %d times", n)
	}
}
