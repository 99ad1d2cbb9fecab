//lint:file-ignore SA1019 http2.Transport is the one client that sends CONNECT with a body that goes on

package egress

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"

	"sallyport/internal/mux"
)

// TestFramesPass counts frames that arrive in pieces of all sizes.
func TestFramesPass(t *testing.T) {
	for range 200 {
		var b bytes.Buffer
		b.WriteString(http2.ClientPreface)
		f := http2.NewFramer(&b, nil)
		data, given := 0, 0
		for range 40 {
			switch rand.N(7) {
			case 0:
				n := rand.N(3000)
				_ = f.WriteData(1, false, make([]byte, n))
				data += n
			case 1:
				n, pad := rand.N(300), rand.N(255)
				_ = f.WriteDataPadded(3, true, make([]byte, n), make([]byte, pad))
				data += n + pad + 1 // and how long the padding is
			case 2:
				n := 1 + rand.N(1<<31-1)
				_ = f.WriteWindowUpdate(0, uint32(n))
				given += n
			case 3:
				_ = f.WriteWindowUpdate(5, 1<<20)
			case 4:
				_ = f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
			case 5:
				_ = f.WriteSettingsAck()
			case 6:
				_ = f.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, rand.N(10))) // none of the protocol
			}
		}
		at := frames{skip: len(http2.ClientPreface)}
		gotData, gotGiven := 0, 0
		for p := b.Bytes(); len(p) > 0; {
			n := min(1+rand.N(1+rand.N(2000)), len(p))
			d, g := at.pass(p[:n])
			gotData, gotGiven, p = gotData+d, gotGiven+g, p[n:]
		}
		if gotData != data || gotGiven != given {
			t.Fatalf("DATA %d, given %d, want %d, %d", gotData, gotGiven, data, given)
		}
	}
}

// TestUnread has a connection bring more than is there.
func TestUnread(t *testing.T) {
	budget := mux.NewBudget(40 << 10)
	var b bytes.Buffer
	f := http2.NewFramer(&b, nil)
	take := func() []byte { p := bytes.Clone(b.Bytes()); b.Reset(); return p }
	_ = f.WriteWindowUpdate(0, connWindow-65535)
	opening := take()
	_ = f.WriteWindowUpdate(0, 16<<10)
	back := take()
	_ = f.WriteData(1, false, make([]byte, 16<<10))
	piece := take()
	u := newUnread(budget)
	u.went(opening)
	u.came([]byte(http2.ClientPreface))
	for i, step := range []struct {
		back bool
		ok   bool
		used int64
	}{{false, true, 0}, {false, true, 16 << 10}, {false, true, 32 << 10}, {true, true, 16 << 10}, {false, true, 32 << 10}, {false, false, 32 << 10}} {
		ok := true
		if step.back {
			u.went(back)
		} else {
			ok = u.came(piece)
		}
		if ok != step.ok || budget.Used() != step.used {
			t.Errorf("step %d: %v, %d taken, want %v, %d", i, ok, budget.Used(), step.ok, step.used)
		}
	}
	u.end()
	if u.came(piece); budget.Used() != 0 {
		t.Errorf("%d taken of what has ended", budget.Used())
	}
}

// TestWhatNobodyReadsOfHTTP2IsBounded has a caller send while its destination is being
// dialled, and nothing left for that.
func TestWhatNobodyReadsOfHTTP2IsBounded(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Names = silentNames{} })
	f, connect := w.framed(t)
	connect(1, "slow.test:443")
	for w.gw.Tunnels() == 0 {
		if t.Context().Err() != nil {
			t.Fatal("nothing was asked of the resolver")
		}
	}
	back := w.gw.exhaust(billing, true)
	for range 3 { // a window of 64 KiB
		_ = f.WriteData(1, false, make([]byte, 16<<10)) // in vain when it has ended meanwhile
	}
	var err error
	for err == nil {
		_, err = f.ReadFrame()
	}
	if strings.Contains(err.Error(), "timeout") {
		t.Errorf("%v, want that the connection has ended", err)
	}
	back()
	tun, ref := dial2(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	echoes(t, tun)
}

// TestWhatIsReadOfHTTP2IsForgotten carries more than a connection may hold, and looks
// what of it is still paid for.
func TestWhatIsReadOfHTTP2IsForgotten(t *testing.T) {
	w := newWorld(t, nil)
	tun, ref := dial2(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	const much = 8 << 20
	sent := make(chan error, 1)
	go func() {
		_, err := tun.Write(make([]byte, much))
		sent <- err
	}()
	if n, err := io.CopyN(io.Discard, tun, much); err != nil {
		t.Fatalf("%d bytes came back: %v", n, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if used := w.gw.crowd.firsts.Used(); used > unreadPortion {
		t.Errorf("%d bytes are taken for what was read", used)
	}
	tun.Close()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; w.gw.crowd.firsts.Used() != 0; <-tick.C {
		if t.Context().Err() != nil {
			t.Fatal("it is not given back")
		}
	}
}

// TestWhatAStreamHasBroughtGoesWithIt has a caller break a stream off whose destination
// neither reads nor writes.
func TestWhatAStreamHasBroughtGoesWithIt(t *testing.T) {
	w := newWorld(t, nil)
	mute := serve(t, func(net.Conn) { <-t.Context().Done() })
	w.use(w.policy(`
p, mute, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:mute.test, *, CONNECT, -, -, allow
`, fmt.Sprintf("  - host: mute.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n", mute)))
	f, connect := w.framed(t)
	connect(1, "mute.test:5432")
	given := make(chan int, 1024)
	go func() {
		for {
			got, err := f.ReadFrame()
			if err != nil {
				return
			}
			if up, ok := got.(*http2.WindowUpdateFrame); ok && up.StreamID == 1 {
				given <- int(up.Increment)
			}
		}
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	const piece = 16 << 10
	for full, credit := 0, streamWindow; full < 100; { // the destination takes no more
		select {
		case n := <-given:
			credit += n
		case <-tick.C:
			full++
		}
		for ; credit >= piece; credit -= piece {
			if err := f.WriteData(1, false, make([]byte, piece)); err != nil {
				t.Fatal(err)
			}
		}
		if w.gw.heldBy(billing) < streamWindow-2*unreadPortion {
			full = 0
		}
	}
	_ = f.WriteRSTStream(1, http2.ErrCodeCancel)
	for ; w.gw.Tunnels() != 0 || w.gw.heldBy(billing) != 0; <-tick.C {
	}
}

// heldBy is what is paid for what a caller's connections hold unread.
func (g *Gateway) heldBy(id spiffeid.ID) int64 {
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	if m := g.crowd.of[id]; m != nil {
		return m.firsts.Used()
	}
	return 0
}

// TestLargeFramesAreRefused has a peer announce a frame for which a megabyte would be
// kept.
func TestLargeFramesAreRefused(t *testing.T) {
	w := newWorld(t, nil)
	f, _ := w.framed(t)
	if err := f.WriteRawFrame(0xee, 0, 0, make([]byte, 17<<10)); err != nil {
		t.Fatal(err)
	}
	for {
		got, err := f.ReadFrame()
		if err != nil {
			t.Fatalf("the connection ended without a word: %v", err)
		}
		if bye, ok := got.(*http2.GoAwayFrame); ok {
			if bye.ErrCode != http2.ErrCodeFrameSize {
				t.Errorf("it ends for %v", bye.ErrCode)
			}
			return
		}
	}
}

// TestConnectHasNoContent refuses one that announces it.
func TestConnectHasNoContent(t *testing.T) {
	w := newWorld(t, nil)
	tr := &http2.Transport{TLSClientConfig: w.client(billing, "h2")}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodConnect, "https://"+w.addr, strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "db.test:5432"
	res, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusBadRequest {
		t.Errorf("answered %s", res.Status)
	}
}
