// Package conform holds an implementation of SPIFFE, ours or another's, to
// what the specifications demand, from outside: a Workload API as the workload
// that it is run as, a SPIRE Server API with its bundle endpoint as a client.
// Each of the numbered demands is met, not met, or could not be looked at, and
// then it says why.
//
// What only a validator does is seen by lying to it. For that the package is a
// trust domain of its own, which the implementation under test is told to
// federate with: a Domain signs what it likes, right and wrong. No key of the
// implementation is ever needed. It holds no goroutine after a run.
package conform

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Verdict is about one demand.
type Verdict struct {
	Must Must
	// Looks counts what was looked at or tried.
	Looks int
	// Err is why it was not met.
	Err error
	// Skipped is why it could not be looked at; empty when it was.
	Skipped string
}

// patience bounds each call.
const patience = 10 * time.Second

// audience is that of the tokens that are asked for and made.
const audience = "sallyport-conform"

// A report collects what one form of the check saw.
type report struct {
	form  string
	looks [135]int
	errs  [135][]error
	why   [135]string
}

// say notes one look at demands. An error says what was seen.
func (r *report) say(what string, err error, musts ...int) {
	for _, m := range musts {
		r.looks[m]++
		if err != nil {
			r.errs[m] = append(r.errs[m], fmt.Errorf("%s: %w", what, err))
		}
	}
}

// skip notes why demands cannot be looked at. The first reason stays, and a
// look goes before every reason.
func (r *report) skip(why string, musts ...int) {
	for _, m := range musts {
		if r.why[m] == "" {
			r.why[m] = why
		}
	}
}

// verdicts gives one for each demand.
func (r *report) verdicts() []Verdict {
	out := make([]Verdict, 0, len(musts))
	for _, m := range musts {
		v := Verdict{Must: m, Looks: r.looks[m.Number], Err: errors.Join(r.errs[m.Number]...)}
		if v.Looks == 0 {
			v.Skipped = r.reason(m)
		}
		out = append(out, v)
	}
	return out
}

// reason is why a demand was not looked at.
func (r *report) reason(m Must) string {
	switch why := r.why[m.Number]; {
	case why != "":
		return why
	case m.Number >= 121:
		return "the Broker API is another service, which this check does not ask"
	case len(m.Forms) > 0 && !slices.Contains(m.Forms, r.form):
		return "sallyport conform " + m.Forms[0] + " looks at it"
	case len(m.Forms) == 0:
		return "it cannot be seen from outside"
	}
	return "what would show it was not there"
}

// row is the line of the docs.
func (m Must) row() string {
	var by []string
	for _, f := range m.Forms {
		if m.Absent == "" {
			by = append(by, "`conform "+f+"`")
		}
	}
	for _, t := range m.Tests {
		by = append(by, strings.ReplaceAll(t, "|", `\|`))
	}
	if m.Absent != "" {
		by = append(by, "does not apply: "+m.Absent)
	}
	return "| " + strconv.Itoa(m.Number) + " | " + m.Says + " | " + strings.Join(by, "; ") + " |\n"
}

// code is an error unless err has one of the status codes.
func code(err error, want ...codes.Code) error {
	if got := status.Code(err); !slices.Contains(want, got) {
		return fmt.Errorf("answered %s, want %s", got, want[0])
	}
	return nil
}

// rejected is an error unless err is a refusal of the request itself: an
// answer, a crash and a dropped connection are none.
func rejected(err error) error {
	return code(err, codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.NotFound)
}
