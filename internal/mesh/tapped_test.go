package mesh

import (
	"strings"
	"testing"
)

func TestTapFilters(t *testing.T) {
	call := Tapped{Reporter: "inbound", Src: "a", Dst: "b", Method: "GET", Path: "/v1/x", Status: 503}
	none, denied := call, call
	none.Status, denied.Denied = 0, true
	for _, tt := range []struct {
		f    TapFilter
		call Tapped
		want bool
	}{
		{TapFilter{}, call, true},
		{TapFilter{Reporter: "inbound", Src: "a", Dst: "b", Method: "GET", Path: "/v1", Status: "503"}, call, true},
		{TapFilter{Reporter: "outbound"}, call, false},
		{TapFilter{Src: "b"}, call, false},
		{TapFilter{Path: "/v2"}, call, false},
		{TapFilter{Status: "5xx"}, call, true},
		{TapFilter{Status: "4xx"}, call, false},
		{TapFilter{Status: "5xx"}, none, true},
		{TapFilter{Status: "denied"}, call, false},
		{TapFilter{Status: "denied"}, denied, true},
	} {
		if got, err := ParseTapFilter(tt.f.Query()); err != nil || got != tt.f {
			t.Errorf("%+v comes back as %+v, %v", tt.f, got, err)
		}
		if got := tt.f.Sees(&tt.call); got != tt.want {
			t.Errorf("%+v sees %+v: %t", tt.f, tt.call, got)
		}
	}
	for query, want := range map[string]string{
		"status=5x": "status", "status=600": "status", "path=v1": "path", "reporter=issuer": "reporter", "body=x": "body", "src=a&src=b": "src", "%zz": "invalid URL escape",
		"path=/" + strings.Repeat("x", 500) + "&src=" + strings.Repeat("y", 520): "at most 1024", "src=" + strings.Repeat("é", 200): "at most 1024",
	} {
		if _, err := ParseTapFilter(query); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", query, err, want)
		}
	}
}
