package proxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// wsApp gives back the messages that it gets, and says how each connection
// ended.
func wsApp(t *testing.T) (addr string, ended <-chan error) {
	t.Helper()
	over := make(chan error, 16)
	return app(t, func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			over <- err
			return
		}
		for {
			kind, b, err := c.Read(context.Background())
			if err != nil {
				over <- err
				return
			}
			if err := c.Write(context.Background(), kind, b); err != nil {
				over <- err
				return
			}
		}
	}), over
}

// patient has both sidecars wait for the farewell of who is slow and busy.
func patient(r *rig) { r.inCfg.partTime, r.outCfg.partTime = patience, patience }

// webSocket opens one through both sidecars.
func (r *rig) webSocket() *websocket.Conn {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, _, err := websocket.Dial(ctx, "ws://billing.mesh.internal/ok/ws", &websocket.DialOptions{HTTPClient: r.client()})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = c.CloseNow() })
	says(r.t, c, "hello")
	return c
}

// says sends a message and waits for it to come back.
func says(t testing.TB, c *websocket.Conn, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := c.Write(ctx, websocket.MessageText, []byte(text)); err != nil {
		t.Fatal(err)
	}
	if _, b, err := c.Read(ctx); err != nil || string(b) != text {
		t.Fatalf("got %q, %v", b, err)
	}
}

// toldWhy waits until both ends of a WebSocket have read a Close frame.
func toldWhy(t *testing.T, c *websocket.Conn, app <-chan error, code websocket.StatusCode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, _, err := c.Read(ctx)
	if got := websocket.CloseStatus(err); got != code {
		t.Errorf("the client was told %d (%v), want %d", got, err, code)
	}
	if err := <-app; websocket.CloseStatus(err) != code {
		t.Errorf("the application was told %v, want %d", err, code)
	}
}

func TestAWebSocketIsToldThatItIsNotAllowedAnyMore(t *testing.T) {
	addr, ended := wsApp(t)
	r := newRig(t, addr, patient)
	lost := r.webSocket()
	r.inbound.Rejudge()
	says(t, lost, "still allowed")
	read := make(chan struct{})
	began := time.Now()
	go func() {
		defer close(read)
		toldWhy(t, lost, ended, websocket.StatusPolicyViolation)
	}()
	r.use("")
	r.inbound.Rejudge()
	t.Logf("closed %s after the edit", time.Since(began).Round(time.Millisecond))
	<-read
	if got := closedFor(r.inAudit, reasonPolicy); len(got) != 1 {
		t.Errorf("recorded %+v", got)
	}
}

// The sidecar of the client says it, too: to its own application.
func TestAWebSocketToARevokedServiceIsToldWhy(t *testing.T) {
	addr, ended := wsApp(t)
	r := newRig(t, addr, patient)
	c := r.webSocket()
	go r.outbound.Rejudge()
	says(t, c, "still believed")
	r.web.Revoke(revocationOf(r.billing))
	go r.outbound.Rejudge()
	toldWhy(t, c, ended, websocket.StatusPolicyViolation)
}

func TestAWebSocketIsToldOfTheEnd(t *testing.T) {
	addr, ended := wsApp(t)
	r := newRig(t, addr, patient, func(r *rig) { r.inCfg.DrainTimeout = 50 * time.Millisecond })
	c := r.webSocket()
	stopped := make(chan error, 1)
	go func() { stopped <- r.stopIn() }()
	toldWhy(t, c, ended, websocket.StatusGoingAway)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestAWebSocketIsToldThatItsTokenHasEnded(t *testing.T) {
	t.Parallel() // most of it is waiting
	addr, ended := wsApp(t)
	r := newTokenRigBefore(t, addr, patient)
	end := time.Now().Truncate(time.Second).Add(8 * time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, _, err := websocket.Dial(ctx, "ws://billing.mesh.internal/pay", &websocket.DialOptions{
		HTTPClient: r.client(), HTTPHeader: http.Header{"Authorization": {"Bearer " + r.tokenUntil(end)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow() //nolint:errcheck // it is closed
	toldWhy(t, c, ended, websocket.StatusPolicyViolation)
	if early := time.Until(end); early > 0 {
		t.Errorf("closed %s before the end of the token", early)
	}
}

// A client in the middle of a frame sees the connection break off, and nothing
// that it could take for a part of the frame.
func TestAWebSocketInTheMiddleOfAFrameIsBrokenOff(t *testing.T) {
	r := newRig(t, rawApp(t, func(c net.Conn, br *bufioReader) {
		if skipHead(br) != nil {
			return
		}
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x82\x7e\x04\x00half")
		_, _ = io.Copy(io.Discard, br)
	}))
	w := r.dialIn(r.web)
	w.say(wsRequest)
	if resp, err := http.ReadResponse(w.r, nil); err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	if _, err := io.ReadFull(w.r, make([]byte, len("\x82\x7e\x04\x00half"))); err != nil {
		t.Fatal(err)
	}
	r.use("")
	r.inbound.Rejudge()
	severed(t, w, "in the middle of a frame")
}
