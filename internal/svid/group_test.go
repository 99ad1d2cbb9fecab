package svid

import (
	"crypto/tls"
	"slices"
	"strings"
	"testing"
)

func TestExchangeSetsTheGroups(t *testing.T) {
	for _, tt := range []struct {
		names string
		want  []tls.CurveID
	}{
		{"", []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256}},
		{"p256", []tls.CurveID{tls.CurveP256}},
		{"x25519 x25519mlkem768", []tls.CurveID{tls.X25519, tls.X25519MLKEM768}},
	} {
		var groups []Group
		for _, name := range strings.Fields(tt.names) {
			var g Group
			if err := g.UnmarshalText([]byte(name)); err != nil {
				t.Fatal(err)
			}
			if text, err := g.MarshalText(); string(text) != name || err != nil {
				t.Errorf("%s is written %s, %v", name, text, err)
			}
			groups = append(groups, g)
		}
		s := NewSource()
		s.Exchange(groups)
		if got := ServerTLS(s, nil).CurvePreferences; !slices.Equal(got, tt.want) {
			t.Errorf("%q: %v, want %v", tt.names, got, tt.want)
		}
	}
	var g Group
	if err := g.UnmarshalText([]byte("x448")); err == nil || !strings.Contains(err.Error(), "write some of x25519mlkem768, x25519, p256") {
		t.Errorf("x448: %v", err)
	}
}
