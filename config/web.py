# Pages of the web, or any mixed text: everything that FineWeb does to it, in its order.
#   python prepare.py config/web.py --source='crawl/**/*.html' --dataset=web --report
# The thresholds are the papers' (prepare.py names them). Add `perplexity` with --perplexity_model,
# `blocklist` with --blocklist, evaluation files with --decontaminate.

# prepare.py
steps = "html,unicode,whitespace,length,language,gopher_repetition,gopher_quality,c4,fineweb,pii,"
steps += "url,exact,near"
