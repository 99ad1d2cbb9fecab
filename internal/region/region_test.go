package region

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"
)

// write makes a database of ranges and what it says of them.
func write(t *testing.T, file string, says map[string]mmdbtype.Map) {
	t.Helper()
	w, err := mmdbwriter.New(mmdbwriter.Options{DatabaseType: "Test-Country", Description: map[string]string{"en": "of a test"}, IncludeReservedNetworks: true})
	if err != nil {
		t.Fatal(err)
	}
	for cidr, m := range says {
		_, n, err := net.ParseCIDR(cidr)
		if err == nil {
			err = w.Insert(n, m)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := w.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	next := file + ".next" // in one step, as updaters do
	if err := os.WriteFile(next, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, file); err != nil {
		t.Fatal(err)
	}
}

func country(code string) mmdbtype.Map {
	return mmdbtype.Map{"country": mmdbtype.Map{"iso_code": mmdbtype.String(code)}, "continent": mmdbtype.Map{"code": mmdbtype.String("EU")}}
}

func TestRegion(t *testing.T) {
	file := filepath.Join(t.TempDir(), "geo.mmdb")
	write(t, file, map[string]mmdbtype.Map{
		"192.0.2.0/25":    country("DE"),
		"192.0.2.128/25":  {"continent": mmdbtype.Map{"code": mmdbtype.String("AF")}},
		"10.0.0.0/8":      {"region": mmdbtype.String("office"), "country": mmdbtype.Map{"iso_code": mmdbtype.String("FR")}},
		"2001:db8::/32":   country("JP"),
		"198.51.100.0/24": {"region": mmdbtype.Uint32(7)}, // of another type: it says nothing
	})
	d, err := Open(map[string]string{"geo": file}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]string{
		"192.0.2.1": "DE", "::ffff:192.0.2.1": "DE", "192.0.2.200": "AF", "10.1.2.3": "office",
		"2001:db8::1": "JP", "fe80::1%eth0": "", "203.0.113.1": "", "198.51.100.1": "",
	} {
		if got := d.Region("geo", netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %q, want %q", addr, got, want)
		}
	}
	if got := d.Region("other", netip.MustParseAddr("192.0.2.1")); got != "" {
		t.Errorf("a database that is not there said %q", got)
	}
	if n := testing.AllocsPerRun(100, func() { d.Region("geo", netip.MustParseAddr("192.0.2.1")) }); n > 1 {
		t.Errorf("%v allocations", n)
	}
}

func TestFollow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "geo.mmdb")
	at := map[string]mmdbtype.Map{"192.0.2.0/24": country("DE")}
	write(t, file, at)
	var log bytes.Buffer
	told := make(chan struct{}, 8)
	d, err := Open(map[string]string{"geo": file}, slog.New(slog.NewTextHandler(signal{&log, told}, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- d.Follow(ctx) }()
	says := func(want string) { // after the next word in the log
		t.Helper()
		<-told
		if got := d.Region("geo", netip.MustParseAddr("192.0.2.1")); got != want {
			t.Fatalf("it says %q, want %q", got, want)
		}
	}
	write(t, file, map[string]mmdbtype.Map{"192.0.2.0/24": country("NL")})
	says("NL")
	bad := file + ".bad" // in one step, or it may be told of twice
	if err := os.WriteFile(bad, []byte("no database"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(bad, file); err != nil {
		t.Fatal(err)
	}
	says("NL") // the one before
	write(t, file, at)
	says("DE")
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "name=geo") {
		t.Errorf("the log does not name the database: %s", &log)
	}
}

// A signal is a writer that tells of each write.
type signal struct {
	b    *bytes.Buffer
	told chan<- struct{}
}

func (s signal) Write(b []byte) (int, error) {
	n, err := s.b.Write(b)
	s.told <- struct{}{}
	return n, err
}

func TestMistakes(t *testing.T) {
	err := Validate(map[string]string{"Geo": "/geo.mmdb", "geo": "geo.mmdb", "good": "/geo.mmdb"})
	if want := `Geo: "Geo" is not a name of lower-case letters, digits, "-" and "_"` + "\n" + `geo: "geo.mmdb" is not an absolute path to a file of MaxMind's format`; err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	file := filepath.Join(t.TempDir(), "geo.mmdb")
	for _, b := range []string{"", "no database", strings.Repeat("\xab\xcd\xefMaxMind.com", 3)} {
		if err := os.WriteFile(file, []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(map[string]string{"geo": file}, nil); err == nil || !strings.Contains(err.Error(), "geo: "+file) {
			t.Errorf("%.10q: %v", b, err)
		}
	}
}
