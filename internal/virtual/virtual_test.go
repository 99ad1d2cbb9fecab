package virtual

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var (
	v4 = netip.MustParsePrefix("247.0.0.0/8")
	v6 = netip.MustParsePrefix("fd00:e::/64")
)

func open(t *testing.T, path string, v4 netip.Prefix) *Book {
	t.Helper()
	b, err := Open(path, v4, v6)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestAddressesStandForNames(t *testing.T) {
	file := filepath.Join(t.TempDir(), "addresses.json")
	b := open(t, file, v4)
	names := []string{"billing.mesh.internal", "payment.mesh.internal"}
	if err := b.Use(names); err != nil {
		t.Fatal(err)
	}
	again := open(t, file, v4)
	for _, name := range names {
		a4, a6, ok := b.Addresses(name)
		if !ok || !v4.Contains(a4) || !v6.Contains(a6) {
			t.Errorf("%s: %s and %s are not in the ranges", name, a4, a6)
		}
		for _, b := range []*Book{b, again} {
			for _, a := range []netip.Addr{a4, a6, netip.AddrFrom16(a4.As16())} {
				if got, _ := b.Name(a); got != name {
					t.Errorf("%s stands for %q, want %s", a, got, name)
				}
			}
		}
	}
	// The same on every machine, unless two names meet.
	other := open(t, filepath.Join(t.TempDir(), "x"), v4)
	if err := other.Use(names[:1]); err != nil {
		t.Fatal(err)
	}
	want, _, _ := b.Addresses(names[0])
	if got, _, _ := other.Addresses(names[0]); got != want {
		t.Errorf("another machine has %s for %s, this one %s", got, names[0], want)
	}
	for _, a := range []string{"247.0.0.0", "247.255.255.255", "10.0.0.1", "fd00:e::", "fd00:e::1:0:0", "fd00:f::1", "::1"} {
		if name, ok := b.Name(netip.MustParseAddr(a)); ok {
			t.Errorf("%s stands for %s", a, name)
		}
	}
	if _, _, ok := b.Addresses("inventory.mesh.internal"); ok {
		t.Error("a name that was not used has an address")
	}
}

func TestNamesThatMeet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "addresses.json")
		small := netip.MustParsePrefix("247.1.1.0/24")
		b := open(t, file, small)
		var names []string
		for i := range 128 {
			names = append(names, fmt.Sprintf("s%d.mesh.internal", i))
		}
		if err := b.Use(names); err != nil {
			t.Fatal(err)
		}
		seen := map[netip.Addr]string{}
		for _, name := range names {
			a, _, _ := b.Addresses(name)
			if other := seen[a]; other != "" || !small.Contains(a) {
				t.Errorf("%s stands for %s and %s", a, name, other)
			}
			seen[a] = name
		}
		if err := b.Use([]string{"late.mesh.internal"}); !errors.Is(err, ErrFull) {
			t.Errorf("one more: %v", err)
		}
		first, _, _ := b.Addresses("s0.mesh.internal")
		time.Sleep(29 * 24 * time.Hour)
		if err := b.Use(names[:1]); err != nil {
			t.Fatal(err)
		}
		if err := b.Use([]string{"late.mesh.internal"}); !errors.Is(err, ErrFull) {
			t.Errorf("an address is given away before a month has passed: %v", err)
		}
		time.Sleep(2 * 24 * time.Hour)
		if err := b.Use([]string{"late.mesh.internal"}); err != nil {
			t.Errorf("after a month: %v", err)
		}
		if got, _, _ := b.Addresses("s0.mesh.internal"); got != first {
			t.Errorf("a name that is in use has moved from %s to %s", first, got)
		}
		if got, _, _ := open(t, file, small).Addresses("s0.mesh.internal"); got != first {
			t.Errorf("after a restart %s, before %s", got, first)
		}
	})
}

// TestInventedNames has names below a pattern take no more than their share, and
// keep their addresses over a restart.
func TestInventedNames(t *testing.T) {
	file := filepath.Join(t.TempDir(), "addresses.json")
	small := netip.MustParsePrefix("247.1.1.0/24")
	b := open(t, file, small)
	first := netip.Addr{}
	for i := range 64 {
		a4, a6, err := b.Assign(fmt.Sprintf("x%d.b.example", i), true)
		if err != nil || !small.Contains(a4) || !v6.Contains(a6) {
			t.Fatalf("name %d: %s, %s: %v", i, a4, a6, err)
		}
		if i == 0 {
			first = a4
		}
	}
	if _, _, err := b.Assign("more.b.example", true); !errors.Is(err, ErrFull) {
		t.Errorf("more than half of the room: %v", err)
	}
	if _, _, err := b.Assign("written.example", false); err != nil {
		t.Errorf("a name that a row writes out has no room: %v", err)
	}
	if _, _, err := b.Assign("more.c.example", true); !errors.Is(err, ErrFull) {
		t.Errorf("more than half of the room: %v", err)
	}
	if err := b.Save(); err != nil {
		t.Fatal(err)
	}
	if got, ok := open(t, file, small).Name(first); got != "x0.b.example" {
		t.Errorf("after a restart %s stands for %q (%v)", first, got, ok)
	}
}

// TestHandedOver has a book lose nothing when another process takes it over.
func TestHandedOver(t *testing.T) {
	file := filepath.Join(t.TempDir(), "addresses.json")
	old := open(t, file, v4)
	next := open(t, file, v4)
	if err := next.Yield(); err != nil {
		t.Fatal(err)
	}
	if err := next.Use([]string{"billing.mesh.internal"}); err != nil {
		t.Fatal(err)
	}
	want, _, err := old.Assign("x.b.example", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Yield(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := old.Assign("y.b.example", true); !errors.Is(err, ErrYielded) {
		t.Errorf("the old one gives an address away: %v", err)
	}
	if got, _, err := old.Assign("x.b.example", true); err != nil || got != want {
		t.Errorf("the old one has forgotten: %s, %v", got, err)
	}
	if err := next.Adopt(); err != nil {
		t.Fatal(err)
	}
	if got, ok := next.Name(want); got != "x.b.example" {
		t.Errorf("at the new one %s stands for %q (%v)", want, got, ok)
	}
	if _, _, ok := next.Addresses("billing.mesh.internal"); !ok {
		t.Error("what was used before has no address")
	}
	y, _, err := next.Assign("y.b.example", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(next.Save(), old.Use([]string{"late.mesh.internal"}), old.Save()); err != nil {
		t.Fatal(err)
	}
	if got, _ := open(t, file, v4).Name(y); got != "y.b.example" {
		t.Errorf("the old one has written over the file: %s stands for %q", y, got)
	}
	if err := next.Yield(); err != nil {
		t.Fatal(err)
	}
	if err := old.Adopt(); err != nil {
		t.Fatal(err)
	}
	if got, _ := old.Name(y); got != "y.b.example" {
		t.Errorf("back at the old one %s stands for %q", y, got)
	}
}

// TestNamesInUseStay has no name of the policy in force forgotten, however long
// that policy stands, nor one that is asked for.
func TestNamesInUseStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := open(t, filepath.Join(t.TempDir(), "addresses.json"), netip.MustParsePrefix("247.1.1.0/24"))
		if err := b.Use([]string{"billing.mesh.internal"}); err != nil {
			t.Fatal(err)
		}
		for i := range 63 {
			if _, _, err := b.Assign(fmt.Sprintf("x%d.b.example", i), true); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			time.Sleep(20 * 24 * time.Hour)
			b.Seen("x0.b.example")
		}
		if _, _, err := b.Assign("more.b.example", true); err != nil {
			t.Errorf("nothing was forgotten: %v", err)
		}
		for name, want := range map[string]bool{"billing.mesh.internal": true, "x0.b.example": true, "x1.b.example": false} {
			if _, _, ok := b.Addresses(name); ok != want {
				t.Errorf("%s has an address: %v, want %v", name, ok, want)
			}
		}
	})
}

func TestBadBooks(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"no JSON":                {"{", "remove the file"},
		"two names, one address": {`{"a":{"cell":7},"b":{"cell":7}}`, "b has the number 7, which is that of a"},
		"outside of the range":   {`{"a":{"cell":4294967295}}`, "outside of the range"},
	} {
		file := filepath.Join(t.TempDir(), "addresses.json")
		if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(file, v4, v6); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	b := open(t, filepath.Join(t.TempDir(), "no", "such", "folder"), v4)
	if err := b.Use([]string{"a"}); err == nil {
		t.Error("a book that cannot be written says nothing")
	}
	if _, _, ok := b.Addresses("a"); !ok {
		t.Error("without a file there is no address at all")
	}
}
