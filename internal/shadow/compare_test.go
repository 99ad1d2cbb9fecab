package shadow

import (
	"fmt"
	"strings"
	"testing"

	"sallyport/internal/archive"
)

func answer(status int, headers, body string) *archive.Answer {
	a := &archive.Answer{Status: status, Message: archive.Message{Body: archive.Body(body)}}
	for line := range strings.Lines(headers) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		a.Headers = append(a.Headers, archive.Field{name, value})
	}
	return a
}

func TestCompare(t *testing.T) {
	for _, tt := range []struct {
		name, a, b string
		ignore     []string
		want       string
	}{
		{"equal", `{"a":1}`, `{"a":1}`, nil, ""},
		{"the order of names means nothing", `{"a":1,"b":[true,null]}`, "{ \"b\": [true, null], \"a\": 1 }", nil, ""},
		{"numbers are as they are written", `{"a":1.10}`, `{"a":1.1}`, nil, "body.a"},
		{"large numbers are not rounded", `[9007199254740993]`, `[9007199254740992]`, nil, "body[]"},
		{"arrays go by index", `{"i":[{"p":1},{"p":2}]}`, `{"i":[{"p":2},{"p":1}]}`, nil, "body.i[].p body.i[].p"},
		{"a longer array", `[1]`, `[1,2]`, nil, "body[]"},
		{"a missing name", `{"a":null}`, `{}`, nil, "body.a"},
		{"another type", `{"a":{"b":1}}`, `{"a":[1]}`, nil, "body.a"},
		{"an object where a number was", `{"a":1}`, `{"a":{}}`, nil, "body.a"},
		{"a whole body that is a word", `"x"`, `"y"`, nil, "body"},
		{"ignored", `{"id":1,"items":[{"at":1,"x":1}]}`, `{"id":2,"items":[{"at":2,"x":1}]}`, []string{"id", "items.*.at"}, ""},
		{"ignored at any depth", `{"a":{"b":{"ts":1}}}`, `{"a":{"b":{"ts":2}}}`, []string{"**.ts"}, ""},
		{"ignored as a report has it", `{"i":[{"p":1,"q":1}],"bodies":1}`, `{"i":[{"p":2,"q":1}],"bodies":2}`, []string{"body.i[].p", "bodies"}, ""},
		{"no JSON", `hello`, `hallo`, nil, "body"},
		{"JSON on one side", `{}`, `hallo`, nil, "body"},
		{"two values", `{} {}`, `{} []`, nil, "body"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, d := range Compare(answer(200, "", tt.a), answer(200, "", tt.b), tt.ignore) {
				got = append(got, d.Field)
			}
			if g := strings.Join(got, " "); g != tt.want {
				t.Errorf("differs in %q, want %q", g, tt.want)
			}
		})
	}
}

func TestCompareHeads(t *testing.T) {
	a := answer(200, "Content-Type: text/plain\nDate: now\nX-A: 1\nX-A: 2\nContent-Length: 2\nX-Gone: 1", "")
	b := answer(503, "content-type: text/plain\nDate: then\nX-A: 1\nX-A: 3\nContent-Length: 3\nX-New: 1", "")
	var got []string
	for _, d := range Compare(a, b, nil) {
		got = append(got, d.Field)
	}
	if g := fmt.Sprint(got); g != "[status header.x-a header.x-gone header.x-new]" {
		t.Error(g)
	}
	if d := Compare(a, b, []string{"Status", "X-A", "header.x-gone", "x-new"}); len(d) > 0 {
		t.Errorf("not ignored: %+v", d)
	}
}

func TestCompareIsBounded(t *testing.T) {
	deep := func(end string) string { return strings.Repeat(`{"a":`, 9000) + end + strings.Repeat("}", 9000) }
	d := Compare(answer(200, "", deep("1")), answer(200, "", deep("2")), nil)
	if len(d) != 1 || len(d[0].Field) > maxField+10 || len(d[0].path) != maxDepth {
		t.Errorf("%d differences", len(d))
	}
	long := strings.Repeat("x", 10_000)
	d = Compare(answer(200, "", `{"`+long+`":1}`), answer(200, "", `{"`+long+`":2}`), nil)
	if len(d) != 1 || len(d[0].Field) > maxField+10 {
		t.Errorf("%d differences", len(d))
	}
	huge := `"` + strings.Repeat("x", maxJSON) + `"`
	if d = Compare(answer(200, "", huge), answer(200, "", huge+" "), nil); len(d) != 1 || d[0].Field != "body" {
		t.Errorf("%+v", d)
	}
	a, b := answer(200, "", ""), answer(200, "", "")
	a.Omitted, a.SHA256, b.Omitted, b.SHA256 = "large", "1", "large", "1"
	if d = Compare(a, b, nil); len(d) != 0 {
		t.Errorf("%+v", d)
	}
	b.SHA256 = "2"
	if d = Compare(a, b, nil); len(d) != 1 || d[0].Field != "body" {
		t.Errorf("%+v", d)
	}
}

// What differs between two primaries as often is no finding.
func TestNoiseIsLearned(t *testing.T) {
	var r Reports
	redact := archive.NewRedactor(archive.RedactConfig{JSON: []string{"secret"}})
	body := func(i int, price string) string {
		return fmt.Sprintf(`{"id":%d,"price":%s,"secret":"s%d"}`, i, price, i)
	}
	for i := range 100 {
		a, b, c := answer(200, "Set-Cookie: a", body(i, "1")), answer(200, "Set-Cookie: b", body(i+1000, "2")), answer(200, "Set-Cookie: c", body(i+2000, "1"))
		r.Add(Seen{Route: "all", Shadow: "next", Method: "GET", Path: fmt.Sprintf("/v1/bills/%d", i+100), Trace: "t"}, Compare(a, b, nil), Compare(a, c, nil), true, redact)
	}
	rep := r.Report()
	if len(rep.Endpoints) != 1 || rep.Endpoints[0].Path != "/v1/bills/{}" || rep.Endpoints[0].Compared != 100 {
		t.Fatalf("%+v", rep)
	}
	want := map[string]string{"body.price": Differs, "body.id": Noise, "body.secret": Noise, "header.set-cookie": Noise}
	for _, f := range rep.Endpoints[0].Fields {
		if f.Verdict != want[f.Field] || f.Differs != 100 {
			t.Errorf("%+v, want %s", f, want[f.Field])
		}
		delete(want, f.Field)
		switch f.Field {
		case "body.secret", "header.set-cookie":
			if f.Sample.Primary != archive.Redacted || f.Sample.Shadow != archive.Redacted {
				t.Errorf("shown: %+v", f.Sample)
			}
		case "body.price":
			if f.Sample.Primary != "1" || f.Sample.Shadow != "2" || f.Sample.Trace != "t" {
				t.Errorf("sample %+v", f.Sample)
			}
		}
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
}

func TestAReportShowsNothingThatIsRedacted(t *testing.T) {
	redact := archive.NewRedactor(archive.RedactConfig{JSON: []string{"card", "**.password"}, Query: []string{"token"}})
	for _, tt := range []struct{ name, headA, a, headB, b, primary, shadow string }{
		{"a whole body of another type", "", `{"card":"hidden","n":1}`, "", `[{"password":"hidden"}]`, `{"card":"[redacted]","n":1}`, `[{"password":"[redacted]"}]`},
		{"the query of an address", "Location: /a?token=hidden&b=1", "", "Location: /a?token=other&b=2", "", "/a?token=[redacted]&b=1", "/a?token=[redacted]&b=2"},
		{"another address", "Location: /a?b=1\nLocation: /c?token=hidden", "", "Location: /a", "", "/a?[redacted]", "/a"},
		{"of what is no address", "X-A: /a?token=shown", "", "", "", "/a?token=shown", "(absent)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := Compare(answer(200, tt.headA, tt.a), answer(200, tt.headB, tt.b), nil)
			if len(d) != 1 {
				t.Fatalf("%+v", d)
			}
			if a, b := text(d[0].a, &d[0], redact), text(d[0].b, &d[0], redact); a != tt.primary || b != tt.shadow {
				t.Errorf("shows %s and %s, want %s and %s", a, b, tt.primary, tt.shadow)
			}
		})
	}
}

// A report does not grow with what callers make up.
func TestReportIsBounded(t *testing.T) {
	var r Reports
	redact := archive.NewRedactor(archive.RedactConfig{})
	for i := range 2 * maxEndpoints {
		name := strings.Repeat("x", i%26+1) + string(rune('a'+i%26)) + strings.Repeat("y", i/26)
		r.Add(Seen{Path: "/" + name}, []Difference{{Field: fmt.Sprint("body.", i), a: "", b: "x"}}, nil, false, redact)
	}
	for i := range 2 * maxFields {
		r.Add(Seen{Path: "/one"}, []Difference{{Field: fmt.Sprint("body.", i), a: "", b: "x"}}, nil, false, redact)
	}
	rep := r.Report()
	if len(rep.Endpoints) > maxEndpoints+1 {
		t.Errorf("%d endpoints", len(rep.Endpoints))
	}
	for _, e := range rep.Endpoints {
		if len(e.Fields) > maxFields+1 {
			t.Errorf("%d fields", len(e.Fields))
		}
	}
}

func FuzzCompare(f *testing.F) {
	for _, s := range []string{`{"a":[1,2,{"b":null}]}`, `[]`, `1e5`, `"\ud800"`, `{"a":1,"a":2}`, ``} {
		f.Add(s, s)
		f.Add(s, `{"a":[1]}`)
	}
	redact := archive.NewRedactor(archive.RedactConfig{JSON: []string{"**.a"}})
	f.Fuzz(func(t *testing.T, a, b string) {
		x, y := answer(200, "", a), answer(200, "", b)
		if d := Compare(x, x, nil); len(d) > 0 {
			t.Errorf("%q differs from itself: %+v", a, d)
		}
		there, back := Compare(x, y, nil), Compare(y, x, nil)
		if len(there) != len(back) {
			t.Errorf("%q and %q differ in %d fields, and the other way round in %d", a, b, len(there), len(back))
		}
		if a == b != (len(there) == 0) {
			v, errA := archive.ParseJSON([]byte(a))
			w, errB := archive.ParseJSON([]byte(b))
			if errA != nil || errB != nil || fmt.Sprint(v) != fmt.Sprint(w) {
				t.Errorf("%q and %q: %+v", a, b, there)
			}
		}
		var r Reports
		r.Add(Seen{}, there, back, true, redact)
		r.Report()
	})
}
