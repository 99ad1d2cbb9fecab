package egress

import (
	"errors"
	"io"
	"net"
	"testing"
)

// A held is a caller that says nothing until it or the gateway breaks off.
type held struct{ net.Conn }

func (h held) CloseWrite() error { return nil }
func (h held) CloseRead()        { h.Close() }
func (h held) Abort()            { h.Close() }

// Read has no orderly end.
func (h held) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if err == io.EOF {
		err = errors.New("reset")
	}
	return n, err
}

// TestOnlyTheCallerIsChargedForWhatItBreaksOff has either side of a relay fail.
func TestOnlyTheCallerIsChargedForWhatItBreaksOff(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fail  func(caller, dest net.Conn)
		wants bool
	}{
		{"the caller reads no more and sends no more", func(caller, _ net.Conn) { caller.Close() }, true},
		{"the destination resets", func(_, dest net.Conn) {
			_ = dest.(*net.TCPConn).SetLinger(0)
			dest.Close()
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			near, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			dest, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer dest.Close()
			a, b := net.Pipe()
			defer b.Close()
			r := &relay{cancel: func() {}, panicked: func(p any) { t.Error(p) }}
			r.setDest(near.(*net.TCPConn))
			r.setCaller(held{a})
			done := make(chan struct{})
			go func() { defer close(done); r.run() }()
			tc.fail(b, dest)
			<-done
			if got := r.brokenOff(); r.why() != ReasonReset || got != tc.wants {
				t.Errorf("ended with %q, charged %v, want %v", r.why(), got, tc.wants)
			}
		})
	}
}
