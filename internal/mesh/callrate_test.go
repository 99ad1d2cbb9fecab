package mesh

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestCallRateNamesEachMistake(t *testing.T) {
	second := Rate{Calls: 50, Per: time.Second}
	for _, c := range []struct {
		rate CallRate
		want string // "" when it is good
	}{
		{CallRate{Rate: second}, ""},
		{CallRate{Caller: "spiffe://demo.sallyport/ns/*/sa/web", Verb: "GET|POST", Path: "/v1/**", Rate: second, Burst: 7}, ""},
		{CallRate{}, `rate: missing; write calls and a time, such as "50/s"`},
		{CallRate{Rate: second, Caller: "web"}, `caller: "web" is not a SPIFFE ID`},
		{CallRate{Rate: second, Caller: "spiffe://*/web"}, "caller: "},
		{CallRate{Rate: second, Verb: "get"}, `verb: unknown verb "get"`},
		{CallRate{Rate: second, Path: "v1"}, "path: "},
		{CallRate{Rate: second, Burst: -1}, "burst: -1 is not between 1 and 1048576"},
	} {
		err := errors.Join(c.rate.Validate()...)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.rate, err, c.want)
		}
	}
	r := CallRate{Path: "/v1/**", Rate: second}.WithDefaults()
	if !r.Counts("GET", "/v1/x") || r.Counts("GET", "/v2") || r.Burst != 50 {
		t.Errorf("%+v", r)
	}
}
