package egress

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

// Rows are those of section B of the bypass corpus.
func TestParseAuthority(t *testing.T) {
	long := strings.Repeat("a", 63)
	name253 := strings.Repeat(long+".", 3) + strings.Repeat("b", 59) + ".c"
	tests := []struct {
		name, in string
		want     string // empty: refused
	}{
		{"a plain name", "api.example.com:443", "api.example.com"},
		{"row 44: upper case becomes lower", "API.Example.COM:443", "api.example.com"},
		{"row 42: one trailing dot goes", "api.example.com.:443", "api.example.com"},
		{"row 42: two trailing dots", "api.example.com..:443", ""},
		{"row 42: an empty label", "api..example.com:443", ""},
		{"row 42: a leading dot", ".example.com:443", ""},
		{"only a dot", ".:443", ""},
		{"no host", ":443", ""},
		{"empty", "", ""},
		{"row 32: a dotted address is a literal", "203.0.113.66:443", "203.0.113.66"},
		{"row 33: two numbers", "127.1:443", ""},
		{"row 33: one decimal number", "2130706433:443", ""},
		{"row 33: one hex number", "0x7f000001:443", ""},
		{"row 33: an octal part", "0177.0.0.1:443", ""},
		{"row 33: zero", "0:443", ""},
		{"row 33: a leading zero", "127.0.0.01:443", ""},
		{"row 33: hex part last", "127.0.0.0x1:443", ""},
		{"row 33: upper hex", "example.0X7F:443", ""},
		{"row 33: bare 0x", "example.0x:443", ""},
		{"row 33: five numbers", "1.2.3.4.5:443", ""},
		{"row 33: a name ending in a number", "example.com.443:443", ""},
		{"row 33: an address with a trailing dot", "127.0.0.1.:443", ""},
		{"a last label that only starts with a digit", "example.3com:443", "example.3com"},
		{"row 34: mapped becomes IPv4", "[::ffff:127.0.0.1]:443", "127.0.0.1"},
		{"row 35: compatible stays, for the screen", "[::127.0.0.1]:443", "::7f00:1"},
		{"row 37: NAT64 stays, for the screen", "[64:ff9b::7f00:1]:443", "64:ff9b::7f00:1"},
		{"an IPv6 address in canonical form", "[2001:DB8:0::1]:443", "2001:db8::1"},
		{"row 40: a zone", "[::1%lo]:443", ""},
		{"row 40: a zone, escaped", "[::1%25lo]:443", ""},
		{"row 40: a mapped zone", "[::ffff:127.0.0.1%lo]:443", ""},
		{"IPv6 without brackets", "::1:443", ""},
		{"brackets around IPv4", "[127.0.0.1]:443", ""},
		{"brackets around a name", "[example.com]:443", ""},
		{"brackets that do not close", "[::1:443", ""},
		{"bytes after the bracket", "[::1]x:443", ""},
		{"empty brackets", "[]:443", ""},
		{"row 43: Cyrillic", "аpi.example.com:443", ""},
		{"row 43: full-width digits", "\uff11\uff12\uff17.0.0.1:443", ""},
		{"row 43: soft hyphen", "api\u00ad.example.com:443", ""},
		{"row 43: ideographic full stop", "api。example.com:443", ""},
		{"row 43: an A-label stays", "xn--bcher-kva.example:443", "xn--bcher-kva.example"},
		{"row 46: userinfo", "ok.example.com@evil.example.net:443", ""},
		{"row 46: userinfo with port", "ok.example.com:443@evil.example.net:443", ""},
		{"row 48: a star", "*.example.com:443", ""},
		{"row 50: label of 63", long + ".example.com:443", long + ".example.com"},
		{"row 50: label of 64", long + "a.example.com:443", ""},
		{"row 50: name of 253", name253[:253] + ":443", name253[:253]},
		{"row 50: name of 253 and a dot", name253[:253] + ".:443", name253[:253]},
		{"row 50: name of 254", "x" + strings.Repeat(long[:62]+".", 4) + "c:443", ""},
		{"row 51: a single label", "intranet:443", ""},
		{"row 51: localhost", "localhost:443", ""},
		{"an underscore", "_acme.example.com:443", "_acme.example.com"},
		{"a leading hyphen", "-a.example.com:443", ""},
		{"a trailing hyphen", "a-.example.com:443", ""},
		{"NUL", "api.example.com\x00.evil.net:443", ""},
		{"a blank", "api.example.com :443", ""},
		{"a tab", "\tapi.example.com:443", ""},
		{"a percent escape", "api%2eexample.com:443", ""},
		{"a path", "api.example.com:443/", ""},
		{"a path before the port", "api.example.com/:443", ""},
		{"a scheme", "https://api.example.com:443", ""},
		{"no port", "api.example.com", ""},
		{"an empty port", "api.example.com:", ""},
		{"port zero", "api.example.com:0", ""},
		{"a port over 65535", "api.example.com:65536", ""},
		{"a port of six digits", "api.example.com:100443", ""},
		{"a port with leading zero", "api.example.com:0443", ""},
		{"a signed port", "api.example.com:+443", ""},
		{"a named port", "api.example.com:https", ""},
		{"two ports", "api.example.com:443:443", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h, port, err := ParseAuthority(tt.in)
			if tt.want == "" {
				var ref *Refusal
				if !errors.As(err, &ref) || ref.Reason != ReasonName {
					t.Fatalf("ParseAuthority(%q) = %q, %v; want a refusal", tt.in, h, err)
				}
				return
			}
			if err != nil || h.String() != tt.want || port != 443 {
				t.Fatalf("ParseAuthority(%q) = %q, %d, %v; want %q", tt.in, h, port, err, tt.want)
			}
		})
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range []string{"api.example.com:443", "[::1]:1", "1.2.3.4:80", "a@b.c:1", "0x7f.1:2", "[::ffff:1.2.3.4%lo]:9"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, port, err := ParseAuthority(s)
		if err != nil {
			return
		}
		if port == 0 {
			t.Fatalf("%q: port 0 accepted", s)
		}
		again, err := ParseHost(h.String())
		if err != nil || again != h {
			t.Fatalf("%q: normal form %q does not parse to itself: %v, %v", s, h, again, err)
		}
		addr, literal := h.Addr()
		if literal && (addr.Zone() != "" || addr.Is4In6()) {
			t.Fatalf("%q: address %v is not plain", s, addr)
		}
		if !literal {
			if _, err := netip.ParseAddr(h.String()); err == nil {
				t.Fatalf("%q: name %q is an address", s, h)
			}
			if strings.ToLower(h.String()) != h.String() || len(h.String()) > 253 {
				t.Fatalf("%q: name %q is not normal", s, h)
			}
		}
	})
}
