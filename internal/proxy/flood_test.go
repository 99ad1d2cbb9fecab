package proxy

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mux"
	"sallyport/internal/svid"
)

// dialInFrom is dialIn from another address of this machine.
func (r *rig) dialInFrom(ip string, src *svid.Source) *wire {
	r.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	c, err := d.Dial("tcp", r.inAddr)
	if err != nil {
		r.t.Fatal(err)
	}
	return wireOn(r.t, c, svid.ClientTLS(src, billing, "http/1.1"))
}

// breakOff resets a connection on which it has said something.
func breakOff(t *testing.T, addr, text string) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	_, _ = c.Write([]byte(text)) // it may be refused already
	c.Close()
}

// An address that resets more than others can bear is not let in for a while,
// and that is all: what stands goes on, and other addresses are let in.
func TestFloodOfResetsCostsItsSourceOnly(t *testing.T) {
	r := newRig(t, app(t, hello))
	stands := r.dialIn(r.web)
	stands.say(okRequest)
	stands.answer("GET")
	await(t, func() bool { // what comes back meanwhile is used up, too
		for range brokenBurst / costHandshake {
			breakOff(t, r.inAddr, "\x16\x03\x01")
		}
		n := r.metric(`sallyport_connections_refused_total{reason="resets",reporter="inbound"}`)
		return n != "" && n != "0"
	})
	stands.say(okRequest)
	if resp, _ := stands.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("the connection that stood got %s", resp.Status)
	}
	other := r.dialInFrom("127.0.0.9", r.web)
	other.say(okRequest)
	if resp, _ := other.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("another address got %s", resp.Status)
	}
	await(t, func() bool { // and it is borne again
		return !r.inbound.calm.Over(mux.SourceOf(stands.LocalAddr()))
	})
	again := r.dialIn(r.web)
	again.say(okRequest)
	if resp, _ := again.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("afterwards: %s", resp.Status)
	}
}

// What an identity breaks off is not charged to the address that it has in common
// with others.
func TestFloodOfResetsCostsItsIdentityOnly(t *testing.T) {
	r := newParts(t, app(t, hello))
	r.inbound.calmOf = mux.NewCalm[spiffeid.ID](costHandshake, 0) // one is too much, for ever
	r.inAddr, r.stopIn = start(t, r.inbound.Run)
	r.use(r.access)
	stands := r.dialIn(r.web)
	stands.say(okRequest)
	stands.answer("GET")
	flood := r.dialIn(r.billing)
	flood.say("GET /")
	flood.Close()
	await(t, func() bool { return r.inbound.calmOf.Over(billing) })
	again := r.dialIn(r.billing)
	if _, err := again.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("whoever flooded is let in: %v", err)
	}
	if n := r.metric(`sallyport_connections_refused_total{reason="resets",reporter="inbound"}`); n != "1" {
		t.Errorf("%s were refused", n)
	}
	for _, w := range []*wire{stands, r.dialIn(r.web)} {
		w.say(okRequest)
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
			t.Errorf("a neighbour got %s", resp.Status)
		}
	}
}

// A workload that floods its own door is served all the same.
func TestFloodOfOwnResets(t *testing.T) {
	r := newRig(t, app(t, hello))
	for range ownBurst + 500 {
		breakOff(t, r.outAddr, "GET ")
	}
	w := r.dial()
	w.say(proxied)
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("got %s", resp.Status)
	}
	if n := r.metric(`sallyport_connections_refused_total{reason="resets",reporter="outbound"}`); n != "" && n != "0" {
		t.Errorf("%s were refused", n)
	}
}

// Peers that prove nothing crowd out their own only.
func TestHandshakeFloodStaysWithItsSource(t *testing.T) {
	r := newRig(t, app(t, hello), func(r *rig) { r.inCfg.MaxHandshakes = 4 })
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	slow, err := net.Dial("tcp", r.inAddr) // an honest one, which takes long
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	await(t, func() bool { return r.inbound.unproved.Len() == 1 })
	for range 40 {
		c, err := d.Dial("tcp", r.inAddr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	await(t, func() bool {
		return r.metric(`sallyport_connections_refused_total{reason="handshakes",reporter="inbound"}`) == "37"
	})
	w := wireOn(t, slow, svid.ClientTLS(r.web, billing, "http/1.1"))
	w.say(okRequest)
	if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
		t.Errorf("got %s", resp.Status)
	}
}

// The handshakes of an address whose connections come to nothing wait for each
// other, whoever has proved to be there, and none for long; those of other addresses
// do not.
func TestHandshakesOfAWornSourceWait(t *testing.T) {
	for _, tt := range []struct {
		name        string
		costs, want time.Duration
	}{
		{"not for long", 50 * time.Millisecond, 50 * time.Millisecond},
		{"as long as it may", 2 * turnWithin, turnWithin},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newParts(t, app(t, hello))
			r.inbound.vain = mux.NewCalm[mux.Source](1000*costHandshake, costHandshake/tt.costs.Seconds())
			r.inAddr, r.stopIn = start(t, r.inbound.Run)
			r.use(r.access)
			flood := r.dialIn(r.billing)
			r.inbound.vain.Spend(mux.SourceOf(flood.LocalAddr()), 700*costHandshake) // far more than half of it
			flood.Close()
			other := r.dialInFrom("127.0.0.9", r.web)
			other.say(okRequest)
			if resp, _ := other.answer("GET"); resp.StatusCode != 200 {
				t.Errorf("another address got %s", resp.Status)
			}
			began := time.Now()
			again := r.dialIn(r.web)
			again.say(okRequest)
			if resp, _ := again.answer("GET"); resp.StatusCode != 200 {
				t.Errorf("got %s", resp.Status)
			}
			if took := time.Since(began); took < tt.want {
				t.Errorf("it waited %v, want %v at least", took, tt.want)
			}
		})
	}
}

// A connection that is put out for others does not keep its place while it waits.
func TestWhoIsExpelledWaitsNoLonger(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for name, before := range map[string]bool{"before it waits": true, "while it waits": false} {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c := &conn{Conn: nc}
			goesOn := make(chan bool)
			waits := func() { goesOn <- c.outlasts(t.Context(), time.Hour) }
			if before {
				c.expel()
				go waits()
			} else {
				go waits()
				await(t, func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.out != nil })
				c.expel()
			}
			if <-goesOn {
				t.Error("it goes on")
			}
		})
	}
}

// Connections that have had their calls are no flood when their machine goes away;
// others are charged, however they end.
func TestConnectionsThatEndAreNotInVain(t *testing.T) {
	r := newParts(t, app(t, hello))
	r.inbound.vain = mux.NewCalm[mux.Source](brokenBurst, 0) // nothing comes back meanwhile
	r.inAddr, r.stopIn = start(t, r.inbound.Run)
	r.use(r.access)
	gone := func(w *wire) error { return w.Conn.(*tls.Conn).NetConn().Close() } // without a farewell
	for _, tt := range []struct {
		name, ip, say string
		served        bool
		end           func(w *wire) error
	}{
		{"one that had a call", "127.0.0.1", okRequest, true, gone},
		{"one that had none", "127.0.0.9", "", false, gone},
		{"one that left in the middle of a call", "127.0.0.10", "GET /", false, func(w *wire) error { return w.Close() }},
	} {
		w := r.dialInFrom(tt.ip, r.web)
		source := mux.SourceOf(w.LocalAddr())
		w.say(tt.say)
		if tt.served {
			w.answer("GET")
		}
		if err := tt.end(w); err != nil {
			t.Fatal(err)
		}
		await(t, func() bool { return r.inbound.carries() == 0 })
		if free := r.inbound.vain.Spend(source, brokenBurst-1); free != tt.served {
			t.Errorf("%s: counted is %v", tt.name, !free)
		}
	}
}
