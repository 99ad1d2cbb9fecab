package mesh

import (
	"errors"
	"fmt"
	"strings"
)

// adminFile holds the rows that make the rights of operators finer.
const adminFile = "admin.csv"

// AdminLocal stands for the user of the issuer's admin socket in a row.
const AdminLocal = "local"

// An AdminRule is one row of admin.csv: "p, id, caller, method, on, effect".
// Among the rows that match a call, deny overrides.
type AdminRule struct {
	ID string `json:"id"`
	// Caller is a pattern of SPIFFE IDs as in access.csv, or AdminLocal. "**"
	// is every workload, and not the local user.
	Caller string `json:"caller"`
	// Method is like "entry.BatchCreateEntry", "entry.*" or "*".
	Method string `json:"method"`
	// On is a pattern of the identities that the call concerns. Calls that
	// concern none in particular match "**" only.
	On     string `json:"on"`
	Effect Effect `json:"effect"`
	Origin Origin `json:"origin"`
}

// Columns of a row of admin.csv, counted from the kind.
const (
	adminID = 2 + iota
	adminCaller
	adminMethod
	adminOn
	adminEffect
	adminFields = iota + 1
)

// parseAdmin reads admin.csv, which has the form of access.csv.
func parseAdmin(src []byte) ([]AdminRule, Errors) {
	const form = "p, id, caller, method, on, effect"
	if len(src) > maxRows {
		return nil, Errors{{File: adminFile, Msg: fmt.Sprintf("file has more than %d bytes", maxRows)}}
	}
	var rules []AdminRule
	var errs Errors
	for i, text := range splitLines(src) {
		if strings.TrimSpace(text) == "" || text[0] == '#' {
			continue
		}
		f, p := splitRow(text)
		switch {
		case p != nil:
		case f[0] != "p":
			p = &Problem{field: colKind, Msg: fmt.Sprintf("unknown kind of row %q: rows of admin.csv are %s", clip(f[0]), form)}
		case len(f) != adminFields:
			p = &Problem{field: min(len(f), adminFields+1), Msg: fmt.Sprintf("row has %d fields, want %d: %s", len(f), adminFields, form)}
		}
		if p != nil {
			p.File, p.Line, p.Text = adminFile, i+1, text
			if p.field > 0 {
				p.Col = columnOfField(text, p.field)
			}
			errs = append(errs, p)
			continue
		}
		rules = append(rules, AdminRule{
			ID: f[adminID-1], Caller: f[adminCaller-1], Method: f[adminMethod-1], On: f[adminOn-1],
			Effect: Effect(f[adminEffect-1]), Origin: Origin{File: adminFile, Line: i + 1},
		})
	}
	return rules, errs
}

// adminRules checks the rows.
func (v *validator) adminRules() {
	seen := map[string]Origin{}
	for _, r := range v.p.Admin {
		check := func(column int, err error) {
			if err != nil {
				v.cell(r.Origin, column, "%s", err)
			}
		}
		if !plainWord(r.ID, 64) {
			check(adminID, fmt.Errorf("id %q is not 1 to 64 letters, digits, hyphens, dots or underscores", clip(r.ID)))
		}
		if first, ok := seen[r.ID]; ok {
			check(adminID, fmt.Errorf("id %q is written twice, first at %s", r.ID, first))
		}
		seen[r.ID] = r.Origin
		check(adminCaller, checkAdminCaller(r))
		check(adminMethod, checkMethod(r.Method))
		if r.On != Any {
			check(adminOn, CheckIDPattern(r.On))
		}
		check(adminEffect, oneOf("effect", string(r.Effect), string(Allow), string(Deny)))
	}
}

func checkAdminCaller(r AdminRule) error {
	switch {
	case r.Caller == AdminLocal:
		return nil
	case r.Caller == Any && r.Effect == Allow:
		return errors.New(`caller "**" would make every workload an operator: name who may`)
	case r.Caller == Any:
		return nil
	}
	return CheckIDPattern(r.Caller)
}

func checkMethod(m string) error {
	if m == "*" {
		return nil
	}
	service, method, ok := strings.Cut(m, ".")
	if ok && plainWord(service, 32) && (method == "*" || plainWord(method, 64) && !strings.ContainsAny(method, ".-_")) {
		return nil
	}
	return fmt.Errorf("method %q is not like entry.BatchCreateEntry, entry.* or *", clip(m))
}
