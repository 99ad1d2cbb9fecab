package mesh

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// LongestTap ends a look at calls that somebody has forgotten.
const LongestTap = 10 * time.Minute

// maxTapFilter bounds a filter, which the audit has whole: bytes of its query.
const maxTapFilter = 1 << 10

// A Tapped is a call that has ended, as who taps a proxy sees it: neither its
// query nor its body, and of its fields no value that could be a secret. A tunnel
// through a gateway is one, whose method is CONNECT.
type Tapped struct {
	Time     time.Time `json:"time"`
	Reporter string    `json:"reporter"` // inbound or outbound of a sidecar, or gateway
	Src      string    `json:"src"`
	Dst      string    `json:"dst"`
	Route    string    `json:"route,omitempty"`
	Method   string    `json:"method"`
	Path     string    `json:"path"`
	// Status is that of HTTP, 0 when the client was told nothing, GRPC that of gRPC.
	Status int    `json:"status"`
	GRPC   string `json:"grpc,omitempty"`
	// Flag says why a proxy answered in the service's place, Denied that the policy
	// had it do so; Decision is the id of the judgement.
	Flag     string  `json:"flag,omitempty"`
	Denied   bool    `json:"denied,omitempty"`
	Decision string  `json:"decision_id,omitempty"`
	Trace    string  `json:"trace_id,omitempty"`
	Took     float64 `json:"ms"`
	Up       int64   `json:"bytes_up"`
	Down     int64   `json:"bytes_down"`
	Retries  int     `json:"retries,omitempty"`
	Shadow   bool    `json:"shadow,omitempty"`
	// Headers are the fields of the request.
	Headers [][2]string `json:"headers,omitempty"`
	// Missed counts calls before this one that came faster than they were taken.
	Missed uint64 `json:"missed,omitempty"`
}

// A TapFilter says which calls are seen. The zero value sees all.
type TapFilter struct {
	// Reporter is inbound, outbound or gateway; Src, Dst and Method must be equal, the path
	// begins with Path.
	Reporter, Src, Dst, Method, Path string
	// Status is a status, or a class such as 5xx, which counts calls without an
	// answer among 5xx. "denied" is what the policy has refused.
	Status string
}

// Query is the filter as a query, without "?".
func (f TapFilter) Query() string {
	q := url.Values{}
	for k, v := range map[string]string{"reporter": f.Reporter, "src": f.Src, "dst": f.Dst, "method": f.Method, "path": f.Path, "status": f.Status} {
		if v != "" {
			q.Set(k, v)
		}
	}
	return q.Encode()
}

// ParseTapFilter reads what Query has written.
func ParseTapFilter(query string) (f TapFilter, err error) {
	if len(query) > maxTapFilter {
		return f, fmt.Errorf("the filter has %d bytes, at most %d are taken", len(query), maxTapFilter)
	}
	q, err := url.ParseQuery(query)
	if err != nil {
		return f, err
	}
	for k, v := range q {
		into := map[string]*string{"reporter": &f.Reporter, "src": &f.Src, "dst": &f.Dst, "method": &f.Method, "path": &f.Path, "status": &f.Status}[k]
		if into == nil || len(v) != 1 {
			return f, fmt.Errorf("%.40q: calls are found by reporter, src, dst, method, path and status, each once", k)
		}
		*into = v[0]
	}
	return f, f.Validate()
}

// Validate reports every mistake by the name of its field.
func (f TapFilter) Validate() error {
	var errs []error
	switch f.Reporter {
	case "", "inbound", "outbound", "gateway":
	default:
		errs = append(errs, fmt.Errorf("reporter: %.40q is none of inbound, outbound and gateway", f.Reporter))
	}
	if f.Path != "" && f.Path[0] != '/' {
		errs = append(errs, fmt.Errorf(`path: %.40q does not begin with "/"`, f.Path))
	}
	n, err := strconv.Atoi(strings.Replace(f.Status, "xx", "00", 1))
	if f.Status != "" && f.Status != "denied" && (err != nil || n < 100 || n > 599) {
		errs = append(errs, fmt.Errorf("status: %.40q is no status such as 503, no class such as 5xx, and not denied", f.Status))
	}
	if n := len(f.Query()); n > maxTapFilter {
		errs = append(errs, fmt.Errorf("the filter has %d bytes, at most %d are taken", n, maxTapFilter))
	}
	return errors.Join(errs...)
}

// Sees says whether a call is one of those.
func (f *TapFilter) Sees(t *Tapped) bool {
	is := func(want, have string) bool { return want == "" || want == have }
	return is(f.Reporter, t.Reporter) && is(f.Src, t.Src) && is(f.Dst, t.Dst) && is(f.Method, t.Method) && strings.HasPrefix(t.Path, f.Path) && f.status(t)
}

func (f *TapFilter) status(t *Tapped) bool {
	class, isClass := strings.CutSuffix(f.Status, "xx")
	switch {
	case f.Status == "":
		return true
	case f.Status == "denied":
		return t.Denied
	case isClass:
		return strconv.Itoa(t.Status/100) == class || t.Status == 0 && class == "5"
	}
	return strconv.Itoa(t.Status) == f.Status
}
