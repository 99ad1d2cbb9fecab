package mesh

import (
	"cmp"
	"errors"
	"fmt"
)

// A CallRate bounds how often each caller may make some of the calls to a
// service. Every caller has a count of its own, at each proxy.
type CallRate struct {
	// Caller is a SPIFFE ID or a pattern of them, as in a row. Default "**",
	// every caller.
	Caller string `yaml:"caller"`
	// Verb is a method, methods joined by "|", or "*". Default "*".
	Verb string `yaml:"verb"`
	// Path is a path or a pattern of them, as in a row. Default "**".
	Path string `yaml:"path"`
	// Rate is such as "50/s", "50/m" or "50/h". Required.
	Rate Rate `yaml:"rate"`
	// Burst is how many calls may come at once. Default: those of one Rate.
	Burst int `yaml:"burst"`
}

// WithDefaults fills what was left out.
func (c CallRate) WithDefaults() CallRate {
	c.Caller, c.Verb, c.Path = cmp.Or(c.Caller, Any), cmp.Or(c.Verb, "*"), cmp.Or(c.Path, Any)
	c.Burst = cmp.Or(c.Burst, c.Rate.Calls)
	return c
}

// Validate reports every mistake, each by the name of its field.
func (c CallRate) Validate() (errs []error) {
	written := c.Burst
	c = c.WithDefaults()
	check := func(field string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, err))
		}
	}
	if c.Caller != Any {
		check("caller", CheckIDPattern(c.Caller))
	}
	check("verb", checkVerb(c.Verb))
	check("path", checkPath(c.Verb, c.Path))
	if c.Rate == (Rate{}) {
		check("rate", errors.New(`missing; write calls and a time, such as "50/s"`))
	}
	if written < 0 || written > 1<<20 {
		check("burst", fmt.Errorf("%d is not between 1 and 1048576", written))
	}
	return errs
}

// Counts says whether a call counts here; who makes it is Caller's to say.
func (c *CallRate) Counts(verb, path string) bool {
	return MatchVerb(c.Verb, verb) && MatchPath(c.Path, path)
}
