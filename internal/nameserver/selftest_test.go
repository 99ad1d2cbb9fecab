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
	for other, want := range map[string]string{
		"":                                       "",
		"run/nscd/socket":                        "of nscd; stop it",
		"run/systemd/resolve/io.systemd.Resolve": "of systemd-resolved; stop it",
	} {
		root := t.TempDir() + "/"
		if other != "" {
			if err := os.MkdirAll(filepath.Dir(root+other), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(root+other, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := Beside(root); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", other, err, want)
		}
	}
}
