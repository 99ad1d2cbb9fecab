package conform

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

func TestNames(t *testing.T) {
	for name, tt := range map[string]struct {
		id   string
		want []int
	}{
		"right":                          {"spiffe://td.example/a/b-c_D.9", nil},
		"a trust domain alone":           {"spiffe://td.example", nil},
		"a trust domain like an address": {"spiffe://192.0.2.1/a", nil},
		"the longest":                    {longName("td.example"), nil},
		"one byte longer":                {longName("td.example") + "a", []int{13}},
		"an upper-case trust domain":     {"spiffe://TD.example/a", []int{5}},
		"an upper-case scheme":           {"SPIFFE://td.example/a", []int{1}},
		"nothing":                        {"", []int{1}},
		"three faults":                   {"spiffe://td/a//b/?q#f", []int{2, 3, 10, 11}},
		"a percent sign in both":         {"spiffe://t%64/%61", []int{7, 9}},
	} {
		if got := slices.Sorted(maps.Keys(nameFaults(tt.id))); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
	for _, b := range badNames {
		if bad := nameFaults(b.of("td.example")); bad[b.must] == nil {
			t.Errorf("%s: %v, want a fault under %d", b.text, bad, b.must)
		}
	}
}

func TestEndpoint(t *testing.T) {
	for address, want := range map[string]string{
		"/run/a.sock": "unix:/run/a.sock", "unix:///run/a.sock": "unix:/run/a.sock", "unix:/run/a.sock": "unix:/run/a.sock",
		"tcp://127.0.0.1:8000": "passthrough:///127.0.0.1:8000", "tcp://[::1]:8000": "passthrough:///[::1]:8000",
		"": "", "run/a.sock": "", "unix:run/a.sock": "", "unix://host/run/a.sock": "", "unix:///a?b": "", "unix:///a#b": "", "unix:///a#": "",
		"unix://": "", "tcp://127.0.0.1": "", "tcp://127.0.0.1:0": "", "tcp://localhost:80": "", "tcp://127.0.0.1:80/": "",
		"tcp://127.0.0.1:80/a": "", "tcp://u@127.0.0.1:80": "", "tcp://127.0.0.1:80?a": "", "http://127.0.0.1:80": "",
	} {
		got, err := Target(address)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", address, got, err, want)
		}
		if err != nil && !strings.Contains(err.Error(), "tcp://127.0.0.1:8000") {
			t.Errorf("%q: %v does not say what would be right", address, err)
		}
	}
}
