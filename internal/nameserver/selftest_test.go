package nameserver

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestReached tells this process from another that answers the same questions,
// and from nobody.
func TestReached(t *testing.T) {
	one, other := newRig(t, nil), newRig(t, nil)
	at := netip.MustParseAddrPort(one.listenUDP(t))
	if err := one.Reached(t.Context(), nil, at); err != nil {
		t.Error(err)
	}
	if err := other.Reached(t.Context(), nil, at); err == nil || !strings.Contains(err.Error(), "is answered by somebody else") {
		t.Errorf("another process: %v", err)
	}
}

func TestSystemResolver(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "resolv.conf")
	for text, want := range map[string]Resolver{
		"nameserver 10.0.0.2\nnameserver fe80::1%eth0\nsearch a.example b.example\n": {[]netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:53"), netip.MustParseAddrPort("[fe80::1]:53")}, []string{"a.example", "b.example"}},
		"# nothing\n": {[]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}, nil},
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := SystemResolver(file)
		if err != nil || !slices.Equal(got.Servers, want.Servers) || !slices.Equal(got.Search, want.Search) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	if got, err := SystemResolver(filepath.Join(dir, "none")); err != nil || len(got.Servers) != 1 {
		t.Errorf("without a file: %+v, %v", got, err)
	}
}

func TestBeside(t *testing.T) {
	const resolved, nscd = "run/systemd/resolve/io.systemd.Resolve", "run/nscd/socket"
	for name, tt := range map[string]struct {
		hosts  string
		others []string
		want   string
	}{
		"DNS servers are asked":              {"hosts: files dns", nil, ""},
		"resolved before DNS":                {"hosts: files resolve [!UNAVAIL=return] dns", []string{resolved}, `write "dns" in place of "resolve"`},
		"resolved is not there":              {"hosts: files resolve [!UNAVAIL=return] dns", nil, ""},
		"resolved after DNS":                 {"hosts: files dns resolve", []string{resolved}, ""},
		"resolved in a comment":              {"hosts: files dns # resolve\n# hosts: resolve", []string{resolved}, ""},
		"nscd":                               {"hosts: files dns", []string{nscd}, "names are looked up by nscd"},
		"there is no file, which means dns":  {"", []string{resolved}, ""},
		"resolved is asked for groups alone": {"group: resolve\nhosts: dns", []string{resolved}, ""},
	} {
		root := t.TempDir() + "/"
		for _, f := range append(tt.others, "etc/nsswitch.conf") {
			if err := os.MkdirAll(filepath.Dir(root+f), 0o700); err != nil {
				t.Fatal(err)
			}
			if f == "etc/nsswitch.conf" && tt.hosts == "" {
				continue
			}
			if err := os.WriteFile(root+f, []byte(tt.hosts+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := Beside(root)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}
