package nameserver

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// listenUDP has the workload's questions answered on loopback until the test
// ends.
func (r *rig) listenUDP(t *testing.T) string {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.ServeUDP(ctx, c, payment) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c.LocalAddr().String()
}

func (r *rig) listenTCP(t *testing.T, who func(net.Conn) Peer) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Serve(ctx, ln, who) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

// patience is for a machine under load.
const patience = 30 * time.Second

// TestOverUDP has many questions at once, the common and the odd, and each
// answered to whoever asked it.
func TestOverUDP(t *testing.T) {
	r := newRig(t, nil)
	addr := r.listenUDP(t)
	v4, _ := r.addresses("api.example.com.")
	type asked struct {
		m    *dns.Msg
		want string
	}
	var conns [4]net.Conn
	for i := range conns {
		c, err := net.Dial("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		conns[i] = c
	}
	for i, c := range conns {
		open := map[uint16]asked{}
		for j := range 20 { // fewer than may be looked at aside
			a := asked{ask("api.example.com.", dns.TypeA, 1232), "NOERROR | " + v4}
			switch j % 4 {
			case 1:
				a = asked{ask("evil.example.", dns.TypeA, 0), "NXDOMAIN | SOA of ."}
			case 2:
				a = asked{ask(reverse(t, v4), dns.TypePTR, 0), "NOERROR | api.example.com."}
			case 3:
				a = asked{ask("api.example.com.", dns.TypeANY, 0), `NOERROR | "RFC8482" ""`}
			}
			a.m.Id = uint16(i*100 + j)
			open[a.m.Id] = a
			if _, err := c.Write(pack(t, a.m)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Write([]byte("no question at all")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 2000)
		for len(open) > 0 {
			n, err := c.Read(b)
			if err != nil {
				t.Fatalf("%d questions have no answer: %v", len(open), err)
			}
			m := unpack(t, b[:n])
			a, ok := open[m.Id]
			if !ok && m.Rcode == dns.RcodeNotImplemented {
				continue // the one that was none
			}
			if !ok || short(m) != a.want || m.Question[0] != a.m.Question[0] {
				t.Fatalf("answer %d is %s, want %s", m.Id, short(m), a.want)
			}
			delete(open, m.Id)
		}
	}
}

func TestOverTCP(t *testing.T) {
	r := newRig(t, nil)
	v4, _ := r.addresses("api.example.com.")
	addr := r.listenTCP(t, always(payment))
	c, err := dns.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 3 { // one after the other on one connection
		m, _, err := (&dns.Client{Net: "tcp", Timeout: patience}).ExchangeWithConn(ask("api.example.com.", dns.TypeA, 0), c)
		if err != nil || short(m) != "NOERROR | "+v4 {
			t.Fatalf("%s, %v", short(m), err)
		}
	}
	// All at once, and each octet in a segment of its own.
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	q := pack(t, ask("evil.example.", dns.TypeA, 0))
	two := append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)
	for _, b := range append(two, two...) {
		if _, err := raw.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		head := make([]byte, 2)
		if _, err := io.ReadFull(raw, head); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, binary.BigEndian.Uint16(head))
		if _, err := io.ReadFull(raw, b); err != nil {
			t.Fatal(err)
		}
		if got := short(unpack(t, b)); got != "NXDOMAIN | SOA of ." {
			t.Error(got)
		}
	}
	for name, in := range map[string][]byte{"no size": {0, 0}, "a size below a header": {0, 5, 1, 2, 3, 4, 5}, "a huge one": {0xff, 0xff}, "an answer": append([]byte{0, 12}, []byte{0, 1, 0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0}...)} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(in); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 10)); n > 0 || err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}

// TestUnknownAsker has nobody answered whom nobody knows, also once a connection
// is open.
func TestUnknownAsker(t *testing.T) {
	r := newRig(t, nil)
	known := make(chan error, 16)
	addr := r.listenTCP(t, func(net.Conn) Peer {
		return func(context.Context) (spiffeid.ID, error) { return payment, <-known }
	})
	c, err := dns.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	known <- nil
	known <- nil
	client := &dns.Client{Net: "tcp", Timeout: patience}
	if _, _, err := client.ExchangeWithConn(ask("api.example.com.", dns.TypeA, 0), c); err != nil {
		t.Fatal(err)
	}
	known <- nil
	known <- errors.New("revoked") // while it waited
	if m, _, err := client.ExchangeWithConn(ask("api.example.com.", dns.TypeA, 0), c); err == nil {
		t.Errorf("it is answered: %s", short(m))
	}
}

// always is a who for the connections of one workload.
func always(id spiffeid.ID) func(net.Conn) Peer {
	return func(net.Conn) Peer {
		return func(context.Context) (spiffeid.ID, error) { return id, nil }
	}
}
