package leak

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMain plays the program that is run again.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "again" {
		c := Config{V4: netip.MustParseAddrPort(os.Args[2])}
		_ = json.NewEncoder(os.Stdout).Encode(Try(context.Background(), c, "tcp4"))
		return
	}
	os.Exit(m.Run())
}

// witness starts a witness on loopback, and gives what it has heard when it ends.
func witness(t *testing.T) (at netip.AddrPort, end func() []string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at = l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var lines []string
	w := &Witness{Heard: func(how string, _ netip.AddrPort, line string) { lines = append(lines, how+" "+line) }}
	ended := make(chan error)
	go func() { ended <- w.Serve(ctx, at) }()
	for Try(t.Context(), Config{V4: at}, "udp4").OK { // it does not listen yet
		if t.Context().Err() != nil {
			t.Fatal("the witness hears nothing")
		}
	}
	return at, func() []string {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		return lines
	}
}

func TestOpenWaysLeak(t *testing.T) {
	at, end := witness(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := Config{V4: at, Self: []string{self, "again", at.String()}, Timeout: 20 * time.Second}
	r := Try(t.Context(), c, "tcp4", "tcp6", "tcp4-in-6", "udp4", "connect", "own-network")
	got := map[string]Result{}
	for _, o := range r.Ways {
		got[o.Way] = o.Result
	}
	if got["tcp4"] != Leaked || got["tcp4-in-6"] != Leaked || got["udp4"] != Leaked || got["tcp6"] != Absent || got["own-network"] == Leaked || r.OK || r.Cases.Failed != 3 {
		t.Errorf("%+v", r)
	}
	heard := end()
	if !slices.ContainsFunc(heard, func(s string) bool { return strings.HasPrefix(s, "tcp sallyport-leak tcp ") }) {
		t.Errorf("the witness heard %q", heard)
	}
}

func TestClosedWaysDoNot(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // somebody who takes connections, as a sidecar does, and is no witness
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("HTTP/1.1 403 Forbidden\r\n\r\n"))
			c.Close()
		}
	}()
	r := Try(t.Context(), Config{V4: l.Addr().(*net.TCPAddr).AddrPort()}, "tcp4", "tcp4-in-6", "udp4")
	if !r.OK || r.Cases.Passed != 3 {
		t.Errorf("%+v", r)
	}
	if r := Try(t.Context(), Config{}, "tcp4"); r.OK || r.Cases.Tried != 0 {
		t.Errorf("a test of nothing passes: %+v", r)
	}
}

// TestResolversLeak has a socket at which names are looked up be a way out.
func TestResolversLeak(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	way := resolver(path)
	try := &trial{Config: Config{Timeout: time.Minute}}
	if got, detail := way(t.Context(), try); got != Absent {
		t.Errorf("without a socket: %s, %s", got, detail)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if got, detail := way(t.Context(), try); got != Leaked {
		t.Errorf("with a socket: %s, %s", got, detail)
	}
}
