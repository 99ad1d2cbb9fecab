package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
)

// What a check can find.
const (
	stateOK   = "ok"
	stateWarn = "warn" // it works, and may not for long
	stateFail = "fail"
	stateSkip = "skip" // it does not apply, or could not be looked at
)

// A diagnosis is what a check finds.
type diagnosis struct {
	State  string `json:"state"`
	Detail string `json:"detail"`
	// Fix is what to do about it.
	Fix string `json:"fix,omitempty"`
}

func good(format string, args ...any) diagnosis {
	return diagnosis{stateOK, fmt.Sprintf(format, args...), ""}
}

func skipped(format string, args ...any) diagnosis {
	return diagnosis{stateSkip, fmt.Sprintf(format, args...), ""}
}

func doubtful(fix, format string, args ...any) diagnosis {
	return diagnosis{stateWarn, fmt.Sprintf(format, args...), fix}
}

func bad(fix, format string, args ...any) diagnosis {
	return diagnosis{stateFail, fmt.Sprintf(format, args...), fix}
}

// A check is one line of the doctor's list. Codes are stable: pipelines and
// docs/doctor.md name them.
type check struct {
	code, name string
	// of are the programs that it looks at, each by itself; none: the machine.
	of   []string
	look func(ctx context.Context, x *examination, i *installed) diagnosis
}

// An examination is one run of the doctor.
type examination struct {
	all []*installed
	now time.Time
}

// A finding is the diagnosis of one check on one program.
type finding struct {
	Code  string `json:"code"`
	Check string `json:"check"`
	// Of is the program, or "machine".
	Of string `json:"of"`
	diagnosis
}

// doctorReport is what the doctor prints as JSON.
type doctorReport struct {
	Name     string         `json:"name"`
	OK       bool           `json:"ok"`
	Cases    map[string]int `json:"cases"`
	Findings []finding      `json:"findings"`
}

// add notes what a check has found.
func (r *doctorReport) add(code, check, of string, d diagnosis) {
	r.Findings = append(r.Findings, finding{code, check, of, d})
	switch d.State {
	case stateSkip:
		r.Cases["skipped"]++
		return
	case stateFail:
		r.Cases["failed"]++
		r.OK = false
	default:
		r.Cases["passed"]++
	}
	r.Cases["tried"]++
}

func newReport(name string) doctorReport {
	return doctorReport{Name: name, OK: true, Cases: map[string]int{"tried": 0, "passed": 0, "failed": 0, "skipped": 0}}
}

// examine makes every check on everything it is about.
func (x *examination) examine(ctx context.Context) doctorReport {
	r := newReport("doctor")
	for _, c := range doctorChecks() {
		if c.of == nil {
			r.add(c.code, c.name, "machine", c.look(ctx, x, nil))
			continue
		}
		for _, i := range x.all {
			// Of what has no configuration the first check has said so.
			if slices.Contains(c.of, i.program) && (i.err == nil || c.code == codeConfiguration) {
				r.add(c.code, c.name, i.name(), c.look(ctx, x, i))
			}
		}
	}
	return r
}

// doctor is "sallyport doctor".
func (c *cli) doctor() *cobra.Command {
	var dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "doctor", Short: "Look at what runs on this machine, and say what to do", Args: cobra.NoArgs,
		Long: `Look at the programs whose configurations are in a directory (issuer.yaml,
gateway.yaml, sidecar.yaml, and sidecar-NAME.yaml): their files, processes,
identities and surroundings. Each check has a code that stays; docs/doctor.md
lists them. Run it as root, or as the user that the programs run as.

Exit code 0: nothing failed. 1: a check failed. 2: there is no configuration.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := findInstalled(cmd.Context(), dir)
			if err != nil {
				return err
			}
			r := (&examination{all: all, now: time.Now()}).examine(cmd.Context())
			return c.report(r, asJSON)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultDir, "the directory of the configurations")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one object of JSON")
	return cmd
}

// report prints what was found; what failed is an error.
func (c *cli) report(r doctorReport, asJSON bool) error {
	if asJSON || c.format == "json" {
		if err := json.NewEncoder(c.stdout).Encode(r); err != nil {
			return err
		}
	} else if err := c.printFindings(r); err != nil {
		return err
	}
	if !r.OK {
		return daemon.Exit(daemon.Failed, fmt.Errorf("%d of %d checks failed", r.Cases["failed"], r.Cases["tried"]))
	}
	return nil
}

func (c *cli) printFindings(r doctorReport) error {
	rows := make([][]string, 0, len(r.Findings))
	for _, f := range r.Findings {
		rows = append(rows, []string{f.Code, f.State, f.Of, f.Check, firstLine(f.Detail)})
	}
	if err := c.emit(r, []string{"CODE", "STATE", "OF", "CHECK", "WHAT"}, rows); err != nil {
		return err
	}
	for _, f := range r.Findings {
		if f.Fix != "" {
			fmt.Fprintf(c.stdout, "\n%s %s: %s\n  next: %s\n", f.Code, f.Of, f.Detail, f.Fix)
		}
	}
	return nil
}

// modeOf tells the mode of a file and whose it is.
func modeOf(path string) (mode os.FileMode, uid uint32, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return 0, 0, err
	}
	return st.Mode(), ownerOf(st), nil
}
