package capture

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMoved names all that one of which nothing but the place is known may be.
func TestMoved(t *testing.T) {
	for _, c := range []struct{ name, network, listen, dial string }{
		{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
		{"IPv6", "tcp6", "[::1]:0", "::1"},
		{"by the mapped address", "tcp", "127.0.0.1:0", "::ffff:127.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen(c.network, c.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			_, port, _ := net.SplitHostPort(l.Addr().String())
			accept := func() net.Conn {
				s, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { s.Close() })
				return s
			}
			var o Owners
			defer o.hangUp()
			to := netip.MustParseAddrPort(l.Addr().String())
			if _, err := o.Moved(to, to.Addr()); !errors.Is(err, ErrNoOwner) {
				t.Errorf("without a connection: %v", err)
			}
			other := start(t, "dial", nil, "tcp", net.JoinHostPort(c.dial, port))
			accept()
			for range 2 {
				mine, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				defer mine.Close()
				accept()
			}
			all, err := o.Moved(to, to.Addr())
			var pids []int
			for _, p := range all {
				pids = append(pids, p.PID)
			}
			want := []int{os.Getpid(), other.Process.Pid}
			slices.Sort(pids)
			slices.Sort(want)
			if err != nil || !slices.Equal(pids, want) {
				t.Errorf("processes %v, %v; want %v", pids, err, want)
			}
			other.expect(t, "ready")
			other.Process.Kill()
			other.Wait()
			// What nobody holds may be the one that is meant.
			half, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			s := accept()
			half.Close()
			if _, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
			if all, err := o.Moved(to, to.Addr()); !errors.Is(err, ErrNoOwner) {
				t.Errorf("with one that nobody holds: %v, %v", all, err)
			}
		})
	}
}

func FuzzParseDump(f *testing.F) {
	msg := make([]byte, nlHeaderLen+diagMsgLen)
	msg[0], msg[4], msg[nlHeaderLen] = byte(len(msg)), unix.SOCK_DIAG_BY_FAMILY, unix.AF_INET
	done := []byte{16, 0, 0, 0, unix.NLMSG_DONE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	f.Add(append(slices.Clone(msg), done...))
	f.Add(msg[:20])
	f.Add([]byte{20, 0, 0, 0, unix.NLMSG_ERROR, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = parseDump(b, func(m []byte) { diagEnds(m) })
	})
}
