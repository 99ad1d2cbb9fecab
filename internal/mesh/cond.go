package mesh

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A CondWord names one kind of condition. The list is closed.
type CondWord string

// The conditions of a row, as they are written before their value.
const (
	CondIssuer    CondWord = "iss="        // token issuer is Value
	CondAudience  CondWord = "aud="        // token audience holds Value
	CondScope     CondWord = "scope~"      // token scope holds Value
	CondClaim     CondWord = "claim."      // token claim Key is Value
	CondACR       CondWord = "acr>="       // token acr is a number, at least Level
	CondEnv       CondWord = "env.name="   // environment of the proxy is Value
	CondSNI       CondWord = "env.sni="    // Value is "same": SNI is the destination
	CondWhen      CondWord = "when="       // time is in the weekly window
	CondUntil     CondWord = "until="      // time is before Until
	CondUnlessSrc CondWord = "unless.src=" // caller does not match pattern Value
	CondBound     CondWord = "bound"       // token is bound to the caller's key
)

// A Cond is one condition of a row. All conditions of a row must hold.
type Cond struct {
	Word CondWord
	// Key is the claim's name, for CondClaim.
	Key   string
	Value string
	// Level is the least acr, for CondACR.
	Level int
	// Until is the first moment at which the row no longer holds.
	Until time.Time
	// Days has bit 1<<time.Weekday set for each day of a CondWhen; From and To
	// are minutes after midnight UTC, From included, To not.
	Days     uint8
	From, To int
}

// Within reports whether t lies in the weekly window of a CondWhen or before
// the end of a CondUntil. For other conditions it is false.
func (c *Cond) Within(t time.Time) bool {
	switch c.Word {
	case CondWhen:
		u := t.UTC()
		m := u.Hour()*60 + u.Minute()
		return c.Days&(1<<u.Weekday()) != 0 && m >= c.From && m < c.To
	case CondUntil:
		return !c.Until.IsZero() && t.Before(c.Until)
	}
	return false
}

// NeedsToken reports whether the condition speaks of the caller's token.
func (c *Cond) NeedsToken() bool {
	switch c.Word {
	case CondIssuer, CondAudience, CondScope, CondClaim, CondACR, CondBound:
		return true
	}
	return false
}

// condWords is in the order in which messages list it.
var condWords = []CondWord{
	CondIssuer, CondAudience, CondScope, CondClaim, CondACR, CondEnv,
	CondSNI, CondWhen, CondUntil, CondUnlessSrc, CondBound,
}

// ParseCond parses the cond column: "-" for no condition, or words separated by
// blanks. A word that is unknown, has no value, has a value of the wrong type
// or contradicts another one is an error.
func ParseCond(s string) ([]Cond, error) {
	if s == "-" {
		return nil, nil
	}
	words := strings.Fields(s)
	if len(words) == 0 {
		return nil, errors.New(`condition is empty: write "-" for none`)
	}
	conds := make([]Cond, 0, len(words))
	seen := make(map[string]bool, len(words))
	for _, w := range words {
		c, err := parseCondWord(w)
		if err != nil {
			return nil, err
		}
		key := string(c.Word) + c.Key
		switch c.Word {
		case CondScope, CondUnlessSrc, CondAudience:
			key += c.Value // several of these can hold together
		}
		if seen[key] {
			return nil, fmt.Errorf("condition %q is written twice", string(c.Word)+c.Key)
		}
		seen[key] = true
		conds = append(conds, c)
	}
	return conds, nil
}

func parseCondWord(w string) (Cond, error) {
	if w == string(CondBound) {
		return Cond{Word: CondBound}, nil
	}
	for _, word := range condWords {
		v, ok := strings.CutPrefix(w, string(word))
		if !ok || word == CondBound {
			continue
		}
		if v == "" {
			return Cond{}, fmt.Errorf("condition %q has no value", w)
		}
		c := Cond{Word: word, Value: v}
		if err := c.fill(); err != nil {
			return Cond{}, fmt.Errorf("condition %q: %w", w, err)
		}
		return c, nil
	}
	return Cond{}, fmt.Errorf("unknown condition %q%s", w, condHint(w))
}

// fill checks the value and sets the typed fields.
func (c *Cond) fill() error {
	switch c.Word {
	case CondClaim:
		k, v, ok := strings.Cut(c.Value, "=")
		if !ok || k == "" || v == "" {
			return errors.New(`want "claim.NAME=VALUE"`)
		}
		c.Key, c.Value = k, v
	case CondACR:
		n, err := strconv.ParseUint(c.Value, 10, 8)
		if err != nil {
			return fmt.Errorf("%q is not a number from 0 to 255", c.Value)
		}
		c.Level = int(n)
	case CondSNI:
		if c.Value != "same" {
			return fmt.Errorf(`%q is not possible here, only "same"`, c.Value)
		}
	case CondUntil:
		t, err := time.Parse(time.RFC3339, c.Value)
		if err != nil {
			return fmt.Errorf("%q is not a time like 2027-01-31T18:00:00Z", c.Value)
		}
		c.Until = t
	case CondWhen:
		return c.fillWhen()
	case CondUnlessSrc:
		return CheckIDPattern(c.Value)
	}
	return nil
}

var weekdays = []string{"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}

func (c *Cond) fillWhen() error {
	bad := fmt.Errorf("%q is not a window like Mon-Fri/08:00-18:00 (UTC)", c.Value)
	days, hours, ok := strings.Cut(c.Value, "/")
	if !ok {
		return bad
	}
	first, last, ranged := strings.Cut(days, "-")
	if !ranged {
		last = first
	}
	from, to, ok := strings.Cut(hours, "-")
	if !ok {
		return bad
	}
	a, b := indexOf(weekdays, first), indexOf(weekdays, last)
	var okFrom, okTo bool
	c.From, okFrom = minutes(from)
	c.To, okTo = minutes(to)
	if a < 0 || b < 0 || !okFrom || !okTo {
		return bad
	}
	if c.From >= c.To {
		return fmt.Errorf("window ends at %s, not after its start %s: write two rows for a night", to, from)
	}
	for d := a; ; d = (d + 1) % 7 {
		c.Days |= 1 << d
		if d == b {
			return nil
		}
	}
}

func indexOf(list []string, s string) int {
	for i, v := range list {
		if v == s {
			return i
		}
	}
	return -1
}

// minutes reads "HH:MM", from 00:00 to 24:00.
func minutes(s string) (int, bool) {
	if len(s) != 5 || s[2] != ':' {
		return 0, false
	}
	h, err1 := strconv.ParseUint(s[:2], 10, 8)
	m, err2 := strconv.ParseUint(s[3:], 10, 8)
	if err1 != nil || err2 != nil || m > 59 || h > 24 || h == 24 && m > 0 {
		return 0, false
	}
	return int(h*60 + m), true
}

// condHint suggests the nearest word of the closed list.
func condHint(w string) string {
	head := w
	if i := strings.IndexAny(w, "=~>"); i >= 0 {
		head = w[:i]
	}
	if strings.HasPrefix(head, "claim") {
		head = "claim."
	}
	names := make([]string, 0, len(condWords))
	full := make(map[string]string, len(condWords))
	for _, c := range condWords {
		n := strings.TrimRight(string(c), "=~>")
		names = append(names, n)
		full[n] = string(c)
	}
	if n := nearest(head, names); n != "" {
		return fmt.Sprintf(": did you mean %q?", full[n])
	}
	return "; known are " + joinWords(condWords)
}

func joinWords(ws []CondWord) string {
	s := make([]string, len(ws))
	for i, w := range ws {
		s[i] = string(w)
	}
	return strings.Join(s, " ")
}
